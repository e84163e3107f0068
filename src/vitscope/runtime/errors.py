"""Errors that a user can correct: one line each, and the exit code that goes with it.

A command that catches a `VitscopeError` prints `error: <str(error)>` on stderr and ends with
`error.exit_code`. Errors of the Python interface (a wrong argument of a measure) stay `ValueError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from vitscope.runtime import redaction


class VitscopeError(Exception):
    """An error with the configuration key it comes from and what to do about it.

    Its text is `<key>=<value>: <why>; <fix>` (`<key>: <why>; <fix>` where `value` is None), always on one
    line.

    Args:
        key: Dotted configuration key, such as `data.root`.
        value: The offending value as the user would recognize it; None leaves it out of the text.
        why: What is wrong.
        fix: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, key: str, value: object, why: str, fix: str) -> None:
        # Every argument goes to Exception, so that the error survives pickling by a loader worker.
        super().__init__(key, value, why, fix)
        self.key = key
        self.value = value
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        """Return the one line a user sees."""
        value = redaction.REDACTED if redaction.is_secret(self.key) else self.value
        subject = self.key if self.value is None else f"{self.key}={value}"
        return redaction.masked(" ".join(f"{subject}: {self.why}; {self.fix}".split()))


class ConfigError(VitscopeError):
    """A configuration value that cannot work (exit code 2)."""

    exit_code = 2


class StructureError(VitscopeError, ValueError):
    """A part of a network that no known unit covers, where a measure speaks of kinds of units (exit code 2).

    Args:
        model: Name of the network.
        problem: The first module that no unit covers, or what is not certain.
        fix: What to pass or to describe.
    """

    exit_code = 2

    def __init__(self, model: str, problem: str, fix: str = "pass structure=[...]") -> None:
        VitscopeError.__init__(self, model, None, problem, fix)
        self.args = (model, problem, fix)  # what __init__ takes, so that the error survives pickling


class DataError(VitscopeError):
    """Data that is missing, unreadable or does not fit (exit code 3)."""

    exit_code = 3


class CheckpointError(VitscopeError):
    """A checkpoint that is missing, corrupt or of another run (exit code 4)."""

    exit_code = 4


class NumericalError(VitscopeError):
    """A loss or result that is not finite (exit code 5)."""

    exit_code = 5


class StorageError(VitscopeError):
    """A disk that is full, read-only or gone (exit code 6)."""

    exit_code = 6


class LockHeldError(StorageError):
    """A folder that another living process holds (exit code 6)."""


class DistributedError(VitscopeError):
    """A rank that failed, hung or disagrees (exit code 7)."""

    exit_code = 7


class OtherRankError(DistributedError, RuntimeError):
    """An error of another rank, which has said why and ends the job with its own exit code (exit code 7).

    Args:
        reason: The rank and the first line of its error.
    """

    def __init__(self, reason: str) -> None:
        VitscopeError.__init__(self, "trainer.devices", None, reason, "see its output")
        self.args = (reason,)  # what __init__ takes, so that the error survives pickling


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a few words that lead from a wrong name to the right ones."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names[:40])}"


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first line of an error's text, without secrets and cut to ``length``; the type's name for an empty text."""
    text = redaction.masked(str(error)).strip()  # before it is cut: half of a secret would not be recognized
    return text.splitlines()[0][:length] if text else type(error).__name__
