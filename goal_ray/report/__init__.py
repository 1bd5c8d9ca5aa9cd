"""Report: curves, metrics and pictures of runs as one HTML page that needs nothing else."""
