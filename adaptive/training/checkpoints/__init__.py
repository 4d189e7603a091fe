"""Checkpoints: capturing, writing, publishing by rename, verifying, restoring."""
