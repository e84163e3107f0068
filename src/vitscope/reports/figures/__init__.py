"""Figures of a report and its HTML page."""
