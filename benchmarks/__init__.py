"""Benchmarks: speed and memory, measured against the plain backbone in one run."""
