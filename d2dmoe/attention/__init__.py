"""Projections around attention: what their outputs weigh, and bases for computing them at low rank."""
