"""Weights of a network: files of them, a beginning from them, how they were trained, and their fingerprint."""
