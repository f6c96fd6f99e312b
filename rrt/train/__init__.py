"""Uptraining: recipes, losses, the train step, checkpoints and the loop."""
