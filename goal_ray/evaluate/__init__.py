"""Evaluation: how well a model finds the picture of a long caption, and the caption of a picture."""
