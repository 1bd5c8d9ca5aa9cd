"""Training: Ray Data feeds Ray Train workers, each of which steps a DeepSpeed engine around the GOAL loss."""
