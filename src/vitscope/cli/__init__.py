"""The commands, their exit codes and their overrides."""
