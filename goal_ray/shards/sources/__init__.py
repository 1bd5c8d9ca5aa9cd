"""What shards are made of: one module per kind of source, each of which yields candidates for samples in order."""
