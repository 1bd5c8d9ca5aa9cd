"""Fused operations: torch and triton only; nothing here knows of CLIP, Ray or files."""
