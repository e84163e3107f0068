"""Checkpoints of a run: how they are written, verified, read, compared and put into a network."""
