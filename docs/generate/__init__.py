"""Pages that are made from something else: recorded results, the recipe's schema, the commands, the paper's map."""
