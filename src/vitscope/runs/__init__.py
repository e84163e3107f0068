"""The run folder: metrics log, results, checkpoints and the W&B copy."""
