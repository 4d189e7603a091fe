"""WebDataset shards and their index: reading samples, the cache of remote shards, prefetching."""
