"""Shard tools: make shards of pictures and captions, look into them, check them, balance and shuffle them."""
