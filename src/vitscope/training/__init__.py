"""Training with Lightning: the module, its callbacks and the state to resume from."""
