"""Checks of what derivatives and parts of a batch take for granted."""
