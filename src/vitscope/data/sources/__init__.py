"""Loaders of image data sets, one module a data set family."""
