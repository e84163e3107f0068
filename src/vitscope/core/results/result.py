"""Base class of results: tables, files, comparison and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.results import result_text

if TYPE_CHECKING:
    from pandas import DataFrame

#: columns of tables whose rows belong to taps
TAP_COORDINATES = {"tap": "taps", "kind": "kinds", "stage": "stages", "depth": "depths"}

#: columns of tables whose rows belong to residual units
UNIT_COORDINATES = {"unit": "units", "kind": "kinds", "stage": "stages", "depth": "depths"}


class Result:
    """Numbers of one measurement: a frozen dataclass whose docstring states the shape of each field under ``Attributes``.

    Measures subclass it with what their tables need::

        @dataclass(frozen=True)
        class SharpnessResult(Result, coordinates={"radius": "radii"}):
            '''...

    Attributes:
                radii: (n_radii,) distances.
                rise: (n_radii,) mean rise.
            '''

    ``coordinates`` names the columns of tables and the fields whose values stand in them (several fields where parts of the
    numbers have their own); ``untabulated`` names fields of vectors and replicates that tables leave out.
    """

    #: set by `dataclass` on every subclass
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    table_coordinates: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    untabulated_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls,
        *,
        coordinates: Mapping[str, str | tuple[str, ...]] | None = None,
        untabulated: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Set the columns of a measure's tables, and keep the methods below in the place of those of `dataclass`."""
        super().__init_subclass__(**options)
        cls.table_coordinates = dict(coordinates or {})
        cls.untabulated_fields = tuple(untabulated)
        cls.__repr__ = Result.__repr__
        cls.__eq__ = Result.__eq__

    @property
    def measure(self) -> str:
        """Name of the measure, as in ``vs.<name>``."""
        return type(self).__module__.rpartition(".")[2]

    def to_dataframe(self) -> DataFrame:
        """Return the numbers as a tidy table: a row a number.

        Columns are ``quantity`` (the field's name), the coordinates of the number (such as ``tap``, ``kind`` and ``depth``, or
        ``x`` and ``y``; of axes without a coordinate their index from 0, or ``rank`` from 1) and ``value``. Coordinates that a
        number does not have are missing, nulls are NaN. Eigenvectors and replicates are left out. ``.attrs`` holds the
        measure's name and the objective card.
        ``df[df.quantity == "variance"]`` is one field; ``df.pivot_table("value", "tap", "quantity")`` has a column a field.
        """
        from vitscope.core.results.result_table import table_of

        return table_of(self)

    def save(self, path: str | Path) -> Path:
        """Write the result with its objective card to one file, which `vs.load_result` reads; return its path.

        A NumPy archive without pickled objects. It is replaced as a whole: a reader sees the old file or the new one.

        Args:
            path: The file; ``.npz`` is appended where the name has no ending.

        Raises:
            ValueError: The name has another ending.
            StorageError: The folder cannot be written.
        """
        from vitscope.core.results import result_file

        return result_file.save(self, Path(path))

    def __eq__(self, other: object) -> bool:
        """Tell whether another result is of the same measure and has the same numbers and card; NaN equals NaN."""
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        return all(_is_equal(getattr(self, name), getattr(other, name)) for name in names)

    def __repr__(self) -> str:
        """Return the measure, its numbers with the range of each array, and the conditions, a line each."""
        return result_text.text_of(type(self).__name__, result_text.result_facts(self))

    def _repr_html_(self) -> str:
        return result_text.html_of(type(self).__name__, result_text.result_facts(self))


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
            return False
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))
    if isinstance(one, ObjectiveCard) and isinstance(other, ObjectiveCard):
        return _is_equal(one.to_dict(), other.to_dict())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other) or (one != one and other != other)
