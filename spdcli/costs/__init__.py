"""What work costs: counted, predicted and measured time and memory, for `spd plan` and `spd bench`."""
