"""Runs and studies as files that leave the machine: bundles of run folders, and numbers for a repository."""
