"""Keys of the configuration: those that set several others at once, and names that stand for another key."""
