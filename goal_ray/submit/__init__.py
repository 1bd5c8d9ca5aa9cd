"""Stages as jobs on a Ray cluster."""
