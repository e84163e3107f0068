"""Principal components of patch features as colors."""
