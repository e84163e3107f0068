"""Configurations: composition, checks, instantiation and identity."""
