"""Observers of the training loop, one concern each."""
