"""Products of a model's curvature matrices with vectors."""
