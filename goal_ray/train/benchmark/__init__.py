"""The benchmark of the training step: `python -m goal_ray.train.benchmark`. Needs neither Ray nor DeepSpeed."""
