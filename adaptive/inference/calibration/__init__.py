"""Choosing thresholds and temperatures on held-out images: which image leaves at which exit."""
