"""The loss of a configuration: its checks, its construction and overrides of its keys."""
