"""goal_ray: fine-tune CLIP on long captions with GOAL, from raw shards to numbers and pictures."""

__version__ = "0.1.0"
