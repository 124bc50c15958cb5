"""What can be read from a decomposition; plain functions over tensors and targets, no printing."""
