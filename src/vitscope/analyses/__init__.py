"""One analysis from its configuration to its files."""
