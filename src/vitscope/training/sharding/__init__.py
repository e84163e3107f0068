"""Training with weights that are sharded over processes."""
