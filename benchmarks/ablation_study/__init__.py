"""The parts of benchmarks/ablation.py: data, variants, runs, tables and figures."""
