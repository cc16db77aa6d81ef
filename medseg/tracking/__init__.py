"""Experiment tracking: runs and their metrics live in MLflow, and training never waits for it."""
