"""Changes of a forward pass by which units and heads are removed."""
