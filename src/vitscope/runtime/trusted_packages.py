"""Packages of the user's own that the environment admits by ``VITSCOPE_TRUST``, and where an error in one of them lies.

Trust is never taken from a configuration, a checkpoint or a file of results.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

#: the environment variable by which a user admits packages
VARIABLE = "VITSCOPE_TRUST"
_held: set[str] | None = None


def packages() -> set[str]:
    """Return the packages that the user's environment admits: while a command runs, what it admitted when it began."""
    return _named() if _held is None else _held


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Read the environment once, before any configuration is composed; what is set later does not count."""
    global _held
    before = _held
    _held = packages()
    try:
        yield
    finally:
        _held = before


def is_trusted(name: str) -> bool:
    """Tell whether a dotted name lies in a package that the user admits."""
    return name.partition(".")[0] in packages()


def place_of(error: BaseException) -> str:
    """Return the module and the line of a trusted package at which an error was raised; an empty text where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = [(frame.f_globals.get("__name__") or "", line) for frame, line in traceback.walk_tb(error.__traceback__)]
    trusted_frames = [(name, line) for name, line in frames if is_trusted(name)]
    return f"{trusted_frames[-1][0]}, line {trusted_frames[-1][1]}" if trusted_frames else ""


def _named() -> set[str]:
    return {name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
