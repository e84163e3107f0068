"""Loggers beside W&B that get a copy of every scalar: Lightning's for CSV files, TensorBoard and MLflow, and Trackio."""
