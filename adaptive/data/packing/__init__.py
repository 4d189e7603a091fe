"""From images in folders, archives and downloads to WebDataset shards with an index."""
