"""The doctor's checks, one function each; a check leaves the machine as it was."""
