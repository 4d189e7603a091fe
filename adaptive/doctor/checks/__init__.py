"""The checks: one small function each, and whatever one changes it undoes."""
