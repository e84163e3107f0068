"""Range checks of configured numbers, with one-line errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitscope.runtime.errors import ConfigError


def integer(key: str, value: float, at_least: int) -> int:
    """Return `value` as an integer.

    Raises:
        ConfigError: It is none, or below `at_least`.
    """
    if isinstance(value, bool) or not math.isfinite(value) or int(value) != value or value < at_least:
        raise ConfigError(key, value, f"not an integer of at least {at_least}", f"set it to {at_least} or more")
    return int(value)


def number(key: str, value: float, low: float, high: float) -> float:
    """Return `value` as a float.

    Raises:
        ConfigError: It is not finite, or not in [low, high].
    """
    if not (math.isfinite(value) and low <= value <= high):
        bracket, example = (")", low + 1) if math.isinf(high) else ("]", (low + high) / 2)
        raise ConfigError(key, value, f"not in [{low:g}, {high:g}{bracket}", f"set it to {example:g}, for instance")
    return float(value)


def channels(key: str, values: Sequence[float], *, positive: bool) -> tuple[float, ...]:
    """Return one float a channel.

    Raises:
        ConfigError: There are not three, or one is not finite, or not positive where it must be, or outside of [0, 1].
    """
    channel_values = tuple(float(value) for value in values)
    if len(channel_values) != 3 or not all(
        math.isfinite(value) and (value > 0 or not positive) for value in channel_values
    ):
        kind = "positive" if positive else "finite"
        raise ConfigError(key, channel_values, f"not three {kind} numbers", "give one per channel")
    if not all(0 <= value <= 1 for value in channel_values):
        example = [round(value / 255, 4) for value in channel_values]
        raise ConfigError(key, list(channel_values), "not in [0, 1], the range of pixels", f"divide by 255: {example}")
    return channel_values
