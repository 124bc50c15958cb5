"""Every figure of the paper, as PNG and SVG, readable in grey."""
