"""The `adaptive` command: one module per sub-command."""
