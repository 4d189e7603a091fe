"""The ``adaptive`` command: one module per sub-command, which parses its options and prints what the wings return."""
