"""A run as one page of HTML that needs nothing else: what was taken apart, how well, its slices, its facts."""
