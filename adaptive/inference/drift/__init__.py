"""Drift: counts of where images leave and how sure of them the exits are, and whether these are still the same."""
