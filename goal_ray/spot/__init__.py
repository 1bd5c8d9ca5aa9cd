"""Spot machines: the cloud's notice that it takes one becomes a node that Ray drains."""
