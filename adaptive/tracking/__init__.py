"""What a run writes while it trains: the JSONL record, the console, Weights & Biases."""
