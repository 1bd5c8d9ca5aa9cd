"""The demo: every stage for real, on drawn scenes with known truth, measured against a baseline."""
