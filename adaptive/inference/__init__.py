"""Inference with early exits: outputs of every exit, calibration, policies, the dynamic runner, export."""
