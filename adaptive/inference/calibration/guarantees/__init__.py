"""Guarantees: what images that chose nothing show of a policy, by exact tests."""
