"""Training: recipes, learning rate schedules, the optimizer, and the files of a run."""
