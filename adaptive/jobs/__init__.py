"""Slurm jobs: batch scripts, the frozen copy of the code, requeueing, staging of shards."""
