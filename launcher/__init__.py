"""How work starts: the `adaptive` command and the script for distributed launchers."""
