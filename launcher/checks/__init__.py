"""What `adaptive doctor` looks at: one small function per check, and whatever one changes it undoes."""
