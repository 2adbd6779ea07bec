"""Routers: their targets, the closed-form fit, and training."""
