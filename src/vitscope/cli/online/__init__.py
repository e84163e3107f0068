"""Commands that need a server."""
