"""Compare a saved state with that of a new object of its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class WrongEntry(Exception):
    """The place of an entry of a checkpoint and what is wrong with it."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"its {place[:120]} {reason}")


def compare_states(value: Any, like: Any, place: str) -> None:
    """Compare a saved state with one of the same object: keys, kinds of leaves, counters that are not negative.

    Args:
        value: The saved state, or a part of it.
        like: The same part of the state of a new object.
        place: Names of the keys that lead to it, for the error.

    Raises:
        WrongEntry: A part is missing or of another kind.
    """
    if isinstance(like, Mapping):
        _compare_mappings(value, like, place)
    elif like is None:
        _check_late_value(value, place)
    elif isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.shape != like.shape:
            raise WrongEntry(place, f"is a {kind_name(value)}, not a tensor of shape {tuple(like.shape)}")
    elif isinstance(like, float):
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise WrongEntry(place, f"is a {kind_name(value)}, not a number")
    elif value is None and isinstance(like, str):  # a name that the object of the checkpoint did not have yet
        return
    elif type(value) is not type(like):
        raise WrongEntry(place, f"is a {kind_name(value)}, not a {kind_name(like)}")
    elif type(like) is int and isinstance(value, int) and value < 0 <= like:
        raise WrongEntry(place, f"is {value}, which is negative")


def _compare_mappings(value: Any, like: Mapping[Any, Any], place: str) -> None:
    if not isinstance(value, Mapping):
        raise WrongEntry(place, f"is a {kind_name(value)}, not a dict")
    for key, item in like.items():
        if key not in value:
            raise WrongEntry(f"{place}.{key}", "is missing")
        compare_states(value[key], item, f"{place}.{key}")


def _check_late_value(value: Any, place: str) -> None:
    """Check a value that a new object does not know yet: a number, the message of a callback, or nothing."""
    number_types = (float, int) if "Checkpoints" in place else (float, int, Tensor)
    is_number = isinstance(value, number_types) and not isinstance(value, bool)
    is_message = isinstance(value, str) and place.endswith("message")
    if value is not None and not is_number and not is_message:
        raise WrongEntry(place, f"is a {kind_name(value)}, not a number")
    check_number(value, place)


def check_number(value: Any, place: str) -> None:
    """Raise WrongEntry for NaN."""
    if isinstance(value, float) and math.isnan(value):
        raise WrongEntry(place, "is NaN")


def is_rate(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < math.inf


def kind_name(value: Any) -> str:
    """Return the name of a value's type."""
    return type(value).__name__
