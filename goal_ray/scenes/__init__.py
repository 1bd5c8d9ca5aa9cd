"""Draws procedural scenes with long captions and known truth: `run.draw_scenes`."""
