"""What `benchmarks/gpu.py` runs on a GPU machine: its parts, the cells of its tables, and the summary."""
