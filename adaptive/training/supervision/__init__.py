"""Signals, time limits and peers: how a run notices that it has to stop, and why."""
