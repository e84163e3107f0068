"""Tidy tables of results: one row per number, with its coordinates."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitscope.core.results.field_shapes import field_shapes

if TYPE_CHECKING:
    from pandas import DataFrame

#: column and first value of the index of axes that are ranks
_RANKS = frozenset({"n_top", "k", "n_ends"})

#: values of the index of an axis of length 2 that holds the ends of an interval
_ENDS = np.array(["lower", "upper"], dtype=object)


def table_of(result: Any) -> DataFrame:
    """Return the numbers of a result as a tidy table, see `Result.to_dataframe`."""
    import pandas as pd

    blocks = _blocks_of(result)
    table = pd.DataFrame({key: _column(key, blocks) for key in _columns([result], blocks)})
    card = getattr(result, "card", None)
    table.attrs = {"measure": result.measure, "card": card.to_dict() if card is not None else None}
    return table


def csv_of(results: Mapping[str, Any]) -> str:
    """Return the numbers of several results as comma-separated values: the rows of `table_of`, after the result's name.

    A missing coordinate and a null are empty. pandas is not needed.

    Args:
        results: Results of one measure by name; a single one without a name has no such column.
    """
    blocks = []
    for name, result in results.items():
        for block in _blocks_of(result):
            blocks.append({"result": [name] * len(block["value"]), **block} if any(results) else block)
    columns = _columns(list(results.values()), blocks)
    if any(results):
        columns = ["result", *columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(dict.fromkeys(columns))
    for block in blocks:
        empty = [""] * len(block["value"])
        writer.writerows(zip(*(map(_cell, block[key]) if key in block else empty for key in dict.fromkeys(columns))))
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return "" if value is None or value != value else value


def _blocks_of(result: Any) -> list[dict[str, Any]]:
    coordinates = getattr(result, "table_coordinates", {})
    left_out = {"card", *getattr(result, "untabulated_fields", ())}
    left_out |= {name for names in coordinates.values() for name in _names(names)}
    names = [field.name for field in dataclasses.fields(result) if field.name not in left_out]
    return [block for name in names for block in _blocks(result, name)]


def _columns(results: Sequence[Any], blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that some row fills: the quantity, coordinates in the order of their declaration, indices, the value."""
    declared = dict.fromkeys(key for result in results for key in getattr(result, "table_coordinates", {}))
    used = dict.fromkeys(key for block in blocks for key in block if key not in ("value", "result"))
    ordered = dict.fromkeys(["quantity", *declared]) | used
    return [*(key for key in ordered if key in used or key == "quantity"), "value"]


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _column(key: str, blocks: Sequence[Mapping[str, Any]]) -> Any:
    """Return a column: whole numbers and missing ones as nullable integers, other numbers as floats, the rest as objects."""
    import pandas as pd

    parts = [np.asarray(block[key]) for block in blocks if key in block and len(block["value"])]
    kinds = {part.dtype.kind for part in parts}
    if key == "value" or (kinds <= set("fiub") and "f" in kinds):
        dtype, missing = "float64", np.nan
    elif kinds and kinds <= set("iub"):
        dtype, missing = "Int64", pd.NA
    else:
        dtype, missing = "object", None
    cells = [
        np.asarray(block[key], dtype=object) if key in block else np.full(len(block["value"]), missing, dtype=object)
        for block in blocks
    ]
    return pd.Series(np.concatenate(cells) if cells else [], dtype=dtype)


def _blocks(result: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a field as columns: none of text, one of a number, one block of an array or a tuple of arrays."""
    value = getattr(result, name)
    if isinstance(value, Mapping):
        numbers = {key: number for key, number in value.items() if _is_number(number)}
        for key, number in numbers.items():
            yield {"quantity": [key], "value": [float(number)]}
    elif _is_number(value):
        yield {"quantity": [name], "value": [float(value)]}
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        yield _rows(result, name, value.ravel().astype(float), list(np.indices(value.shape).reshape(value.ndim, -1)))
    elif isinstance(value, tuple) and value and all(isinstance(part, np.ndarray) for part in value):
        places = [np.indices(part.shape).reshape(part.ndim, -1) for part in value]
        first = np.concatenate([np.full(part.size, i) for i, part in enumerate(value)])
        indices = [first, *np.concatenate(places, axis=1)]
        yield _rows(result, name, np.concatenate([part.ravel() for part in value]).astype(float), indices)


def _rows(result: Any, name: str, values: np.ndarray, indices: Sequence[np.ndarray]) -> dict[str, Any]:
    shapes = field_shapes(type(result))
    axes = shapes.get(name, ())
    if len(axes) != len(indices):
        axes = tuple(f"axis_{i}" for i in range(len(indices)))
    axes = _told_apart(axes)
    place = dict(zip(axes, indices))
    block: dict[str, Any] = {"quantity": np.full(len(values), name, dtype=object)}
    labeled_axes: set[str] = set()
    uses: Counter[str] = Counter()
    for column, fields in getattr(result, "table_coordinates", {}).items():
        for coordinate in _names(fields):
            # a field that two columns name labels the first axis of its length and the second
            own_axes = [_occurrence(axis, uses[coordinate]) for axis in shapes.get(coordinate, ())]
            uses[coordinate] += 1
            if own_axes and set(own_axes) <= set(axes) and len(labels := getattr(result, coordinate)):
                block[column] = _labels(labels, [place[axis] for axis in own_axes])
                labeled_axes.add(own_axes[-1])
                break
    for number, axis in enumerate(axes):
        if axis not in labeled_axes:
            column, index = _index(name, axis, number, place[axis])
            block[column] = index
    block["value"] = values
    return block


def _told_apart(axes: Sequence[str]) -> tuple[str, ...]:
    """Return the axes with a number at the second and further ones of a name."""
    return tuple(_occurrence(axis, axes[:i].count(axis)) for i, axis in enumerate(axes))


def _occurrence(axis: str, times_before: int) -> str:
    return f"{axis}_{times_before + 1}" if times_before and axis.isidentifier() else axis


def _labels(labels: Any, indices: Sequence[np.ndarray]) -> np.ndarray:
    """Return the value of a coordinate at each place."""
    if isinstance(labels, np.ndarray):
        return labels[tuple(indices)]
    if isinstance(labels[0], np.ndarray):
        return np.array([labels[i][tuple(rest)] for i, *rest in zip(*indices)])
    return np.array(labels, dtype=object)[indices[0]]


def _index(name: str, axis: str, number: int, index: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the column of an axis without a coordinate, and its values."""
    if axis == "2" and ("interval" in name or "edges" in name):
        return "end", _ENDS[index]
    if axis in _RANKS:
        return "rank", index + 1
    if axis.startswith("axis_") or axis.isidentifier():
        return ("index" if axis == "n" else _singular(axis.removeprefix("n_"))), index
    return ("component" if axis.isdecimal() else "index") + (
        f"_{number}" if axis.isdecimal() and number > 1 else ""
    ), index


def _singular(text: str) -> str:
    for ending, replacement in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("s", "")):
        if text.endswith(ending):
            return text.removesuffix(ending) + replacement
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)
