"""Augmentation of images as a function of (seed, epoch, index)."""
