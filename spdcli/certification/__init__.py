"""What a sceptic asks of a finished run: one report, its budgets stated, held against the recipe's bounds."""
