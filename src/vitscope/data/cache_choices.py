"""Names of the places where decoded batches are kept; imports no torch."""

from __future__ import annotations

from vitscope.runtime.errors import ConfigError, nearest

#: values of ``probe.cache``; ``auto`` is ``host`` where the batches take little of the free memory, else ``none``
CHOICES = ("auto", "none", "host", "device", "disk")


def check_choice(choice: object) -> None:
    """Check a value of ``probe.cache``.

    Raises:
        ConfigError: An unknown one.
    """
    if choice not in CHOICES:
        raise ConfigError("probe.cache", choice, "no place for decoded images", nearest(str(choice), CHOICES))
