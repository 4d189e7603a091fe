"""Datasets at a URL: file systems, transfers with retries, and commands as pipes."""
