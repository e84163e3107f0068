"""Reports on a W&B server."""
