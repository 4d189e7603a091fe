"""Packing images into shards, and streaming them back in an order that is a function of seed and epoch."""
