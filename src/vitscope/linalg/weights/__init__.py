"""Directions and positions in the space of a model's weights."""
