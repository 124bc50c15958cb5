"""The run directory, and training: what `spd train` and `spd decompose` do, without a console."""
