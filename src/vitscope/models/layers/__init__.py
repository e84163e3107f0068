"""Layers that several models share: attention within a kernel, in windows, and its replacements."""
