"""The warning about numbers that cannot be given: they are NaN in a result and null on disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


class NullWarning(UserWarning):
    """Some entries of a result are null; the text says which and why."""


def warn_nulls(measure: str, reasons: Mapping[str, str]) -> None:
    """Warn once for a measure, naming the entries (taps, units) that are null, grouped by reason.

    Args:
        measure: The measure's name.
        reasons: The reason by entry; nothing happens where it is empty.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    if groups:
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())
        warnings.warn(f"{measure}: null for {text}", NullWarning, stacklevel=3)
