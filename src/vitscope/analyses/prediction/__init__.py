"""Predicted time and memory of analyses, before they start."""
