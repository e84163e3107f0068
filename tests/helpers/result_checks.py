"""Checks of a result's table, file and text, and of the shapes that its docstring states."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import vitscope as vs
from vitscope.core.results.field_shapes import field_shapes


def check_result(result: vs.Result, folder: Path) -> vs.Result:
    """Check the result's shapes, table, file and text; return it as it was read back from its file."""
    check_shapes(result)
    check_table(result)
    path = result.save(folder / "saved")
    assert path == folder / "saved.npz"
    loaded = vs.load_result(path)
    assert loaded == result
    assert loaded.scalars() == pytest.approx(result.scalars(), nan_ok=True)
    lines = repr(result).splitlines()
    assert lines[0] == type(result).__name__
    assert lines[-2].startswith("  measured on")
    assert max(map(len, lines)) < 160
    assert " at 0x" not in repr(result)
    assert result._repr_html_().count("<tr>") == len(lines) - 1
    return loaded


def check_shapes(result: vs.Result) -> None:
    """Check that arrays have the shapes that the docstring states."""
    shapes = field_shapes(type(result))
    lengths: dict[str, int] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
            axes, lengths_of_value = shapes[field.name][:1], (len(value),)
            assert len(shapes[field.name]) == 1 + value[0].ndim, field.name
        elif isinstance(value, np.ndarray):
            axes, lengths_of_value = shapes[field.name], value.shape
        elif isinstance(value, tuple) and field.name in shapes:
            axes, lengths_of_value = shapes[field.name], (len(value),)
        else:
            continue
        assert len(axes) == len(lengths_of_value), field.name
        if 0 in lengths_of_value:  # not asked for
            continue
        for axis, length in zip(axes, lengths_of_value):
            assert lengths.setdefault(axis, length) == length, (field.name, axis)
            assert not axis.isdecimal() or int(axis) == length, field.name


def check_table(result: vs.Result) -> None:
    """Check that the table has a row a number, and that coordinates tell the rows of a quantity apart."""
    table = result.to_dataframe()
    assert list(table.columns)[:: len(table.columns) - 1] == ["quantity", "value"]
    assert table.attrs == {"measure": result.measure, "card": result.card.to_dict()}
    left_out = {name for names in result.table_coordinates.values() for name in np.atleast_1d(names)}
    for field in dataclasses.fields(result):
        value, rows = getattr(result, field.name), table[table.quantity == field.name]
        if field.name in left_out | set(result.untabulated_fields):
            continue
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(rows.value, value.ravel())
        elif isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
            np.testing.assert_array_equal(rows.value, np.concatenate([part.ravel() for part in value]))
        elif isinstance(value, float):
            np.testing.assert_array_equal(rows.value, [value])
    places = table.drop(columns="value")
    assert not places.duplicated().any(), places[places.duplicated()]
    for column, names in result.table_coordinates.items():
        if any(len(getattr(result, name)) for name in np.atleast_1d(names)):
            assert column in table, column
