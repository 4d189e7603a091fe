"""Calibration on held-out images: thresholds, learned gates, temperatures, and risk control."""
