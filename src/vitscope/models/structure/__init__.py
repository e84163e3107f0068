"""Structure of a model: taps, residual units, parameter groups and attention weights."""
