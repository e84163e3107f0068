"""Store the signal that asked the process to stop, for long loops to check.

A signal handler calls `request`; loops call `check` once a product, a grid point or a batch.
"""

from __future__ import annotations

_requested: int | None = None
_n_checks = 0


class Interrupted(Exception):
    """Raised by `check` in a loop that was asked to stop; carries the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def request(signum: int) -> None:
    """Ask every polling loop of this process to stop."""
    global _requested
    _requested = signum


def requested() -> int | None:
    """Return the signal that asked to stop, or None."""
    return _requested


def clear() -> None:
    """Forget an earlier request (a new command in the same process starts afresh)."""
    global _requested
    _requested = None


def n_checks() -> int:
    """Return how often `check` was called: a number that grows while a loop of this process advances."""
    return _n_checks


def check() -> None:
    """Raise `Interrupted` where a stop was asked for."""
    global _n_checks
    _n_checks += 1
    if _requested is not None:
        raise Interrupted(_requested)
