"""The warning of networks, outputs and batches that look unlike what a measure takes them for."""

from __future__ import annotations


class UnlikelyInputWarning(UserWarning):
    """The network, its outputs or the batches look unlike what the measure takes them for; the text says what and why."""
