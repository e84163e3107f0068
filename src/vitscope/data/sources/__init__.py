"""Loaders of image data sets, one module per family of data sets."""
