"""Shapes of a result's fields, as its docstring states them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cache

#: an entry under ``Attributes``: one or more names, a colon, a text that may begin with a shape in parentheses
_ENTRY = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): *(?:\((?P<shape>[^()]*)\))?", re.MULTILINE)


@cache
def field_shapes(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the names of the axes of each field that is an array, or a tuple of one value or array for each place.

    ``accuracy: (n_attacks, n_epsilons) ...`` gives ``("n_attacks", "n_epsilons")``. Of a tuple of arrays the first axis is the
    place in the tuple.

    Args:
        kind: Class of a result.
    """
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    entries: dict[str, tuple[str, ...]] = {}
    for entry in _ENTRY.finditer(text):
        if entry["shape"] is None:
            continue
        axes = tuple(axis.strip() for axis in entry["shape"].split(",") if axis.strip())
        entries |= dict.fromkeys(entry["names"].split(", "), axes)
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: axes for name, axes in entries.items() if name in names}
