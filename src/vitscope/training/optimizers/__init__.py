"""Optimizers that neither torch nor timm has."""
