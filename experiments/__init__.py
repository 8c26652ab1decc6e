"""Training runs and optimizer comparisons; see `experiments.train` and `experiments.sweep`."""
