"""Measuring every exit, choosing thresholds, and running only as deep as an image needs."""
