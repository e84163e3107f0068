"""Numbers of a configuration against the ranges that the arguments they configure declare; imports no library of models."""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from vitscope.config.ranges import library_options
from vitscope.config.ranges.source_signatures import argument_ranges
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.value_ranges import ValueRange, range_of

Ranges = Mapping[str, ValueRange]

#: options of nodes whose targets do not declare ranges, by the node's key; the first match counts
_OPTIONS: tuple[tuple[str, type], ...] = (
    (r"", library_options.RunOptions),
    (r"optimizer(\.base)?", library_options.OptimizerOptions),
    (r"trainer", library_options.TrainerOptions),
    (r"data\.recipe", library_options.DataRecipe),
    (r"analysis\.[^.]+\.(probe|train)", library_options.ProbeOptions),
    (r"analysis\.[^.]+\.when", library_options.MeasurementTimes),
)

#: functions and classes that take the values of nodes without a ``_target_``
_TARGETS = {
    "objective": ("vitscope.data.DataModule", "vitscope.core.objective.Objective"),
    "optimizer.schedule": ("vitscope.core.lr_schedule.factor",),
}


def check_numbers(node: Mapping[str, Any], path: str = "") -> None:
    """Check the numbers of a configuration: each is finite, and in the range that its argument declares.

    Args:
        node: Plain values.
        path: The node's key, '' for the whole configuration.

    Raises:
        ConfigError: Naming the key, the range and the number.
    """
    ranges = _ranges_of(node, path)
    for key, value in node.items():
        check_value(f"{path}.{key}" if path else str(key), value, ranges.get(str(key)))


def check_value(key: str, value: Any, value_range: ValueRange | None) -> None:
    """Check a plain value, the items of a list against the range of its key, and a mapping as `check_numbers` does.

    Raises:
        ConfigError: A number that is not finite or not in the range, or a text for an argument that takes numbers alone.
    """
    if isinstance(value, Mapping):
        check_numbers(value, key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_value(f"{key}.{index}", item, value_range)
    else:
        _check_number(key, value, value_range)


def _check_number(key: str, value: Any, value_range: ValueRange | None) -> None:
    if isinstance(value, str) and value_range is not None and value_range.example:
        raise ConfigError(key, value, "not of type float", f"give a number such as {value_range.example}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "not a finite number", "give a finite number")
    if value_range is not None and not value_range.contains(value):
        raise ConfigError(key, value, f"not {value_range.expected}", f"give a number that is {value_range.expected}")


def _ranges_of(node: Mapping[str, Any], path: str) -> Ranges:
    """Return the ranges of a node's keys: those that its target declares, and those of options that it does not check."""
    options = next((kind for pattern, kind in _OPTIONS if re.fullmatch(pattern, path)), None)
    ranges = dict(field_ranges(options)) if options is not None else {}
    for target in (node.get("_target_"), *_TARGETS.get(path, ())):
        if isinstance(target, str):
            ranges.update(argument_ranges(target))
    return ranges


@functools.cache
def field_ranges(options: type) -> Ranges:
    """Return the ranges that the fields of a dataclass declare, by name."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {name: value_range for name, hint in hints.items() if (value_range := range_of(hint)) is not None}
