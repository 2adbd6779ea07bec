"""Measurements of a model: observers, quality, FLOPs and time."""
