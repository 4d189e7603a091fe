"""Callbacks of the training loop: records, validation, checkpoints, console and dashboard, logs."""
