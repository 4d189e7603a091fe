"""Shards that others made: the checks that packing makes of images in folders, made of tars."""
