"""Where a fact is: slices located by effect, causal tracing, baselines, and the report."""
