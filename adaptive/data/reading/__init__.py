"""From shards to batches: the order of samples, the schedule of a rank, workers, and the stream."""
