"""Ranges of numeric options: where they are declared, and the check of a configuration against them."""
