"""What can be changed in a model, and how it is proved: suppression, ablation, facts, scripts, patches."""
