"""Checks of what training needs of a machine, or of all machines of a job."""
