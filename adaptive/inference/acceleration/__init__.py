"""Stages of the dynamic runner, compiled or captured as CUDA graphs, at a bounded set of batch sizes."""
