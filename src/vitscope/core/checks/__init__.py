"""Checks of options, of what derivatives and parts of a batch take for granted, and of unlikely inputs."""
