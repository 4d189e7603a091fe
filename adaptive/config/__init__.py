"""The configuration of a run: typed sections, checks, loading with overrides, and the generated reference."""
