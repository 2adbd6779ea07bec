"""All that a loaded checkpoint needs."""
