"""Operators handed to and taken from other libraries."""
