"""One thin file per subcommand: parse, call, render. Heavy imports stay inside the functions."""
