"""Cost of a measure before it starts."""
