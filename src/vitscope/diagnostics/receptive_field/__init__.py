"""Effective receptive fields: which pixels of an image a position of a feature map depends on."""
