"""Statistics on numpy arrays: confidence intervals and tests."""
