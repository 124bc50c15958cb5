"""The method itself, over tensors: targets, slices, importances, losses and the step; never prints or reads a file."""
