"""What a model does: observers, quality, FLOPs and time."""
