"""Losses: the forms of targets, named losses and callables, and checks of targets and outputs."""
