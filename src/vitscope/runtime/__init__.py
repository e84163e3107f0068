"""Services of the running process: ranks, errors, progress lines and stop requests."""
