"""What a recipe may say, and every mistake in it with its line. Knows neither torch nor transformers."""
