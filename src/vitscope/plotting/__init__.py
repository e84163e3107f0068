"""Figures: `vs.plot` and the style that all figures share."""
