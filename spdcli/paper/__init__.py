"""What exists only to reproduce the paper: its tables, what must hold of them, and both experiments."""
