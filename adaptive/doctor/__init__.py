"""``adaptive doctor``: checks of what training needs of a machine, or of all nodes of a job."""
