"""What several benchmarks use: timing, result pages, plain loops to compare with."""
