"""Adaptive: image classifiers that can stop early."""
