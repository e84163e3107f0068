"""Types of numeric arguments that carry their range: a signature states type and range, and `config` reads both from it.

A type is an ordinary one for Python and for type checkers: ``n_top: PositiveInt = 5`` takes an int. A configuration whose value
lies outside of the range is refused before anything is built; importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args


@dataclass(frozen=True)
class ValueRange:
    """Range of the numbers that an argument takes.

    Attributes:
        expected: The range in words, which follow "not" in an error.
        contains: Function that tells whether a finite number lies in the range.
        example: A number in the range, for an argument that takes a number from every target; '' elsewhere. A text is then
            refused without importing the target.
    """

    expected: str
    contains: Callable[[Any], bool] = field(repr=False)  # signatures that `help` prints show the words alone
    example: str = field(default="", repr=False)


def range_of(hint: Any) -> ValueRange | None:
    """Return the range that an annotation carries: its own, or that of the first member of a union or sequence with one."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, ValueRange):
            return part
    ranges = map(range_of, get_args(hint))
    return next((value_range for value_range in ranges if value_range is not None), None)


_AT_LEAST_0 = ValueRange("at least 0", lambda v: v >= 0)
_AT_LEAST_1 = ValueRange("at least 1", lambda v: v >= 1)
_GREATER_THAN_0 = ValueRange("greater than 0", lambda v: v > 0)

PositiveInt = Annotated[int, _AT_LEAST_1]
NonNegativeInt = Annotated[int, _AT_LEAST_0]
PositiveFloat = Annotated[float, _GREATER_THAN_0]
NonNegativeFloat = Annotated[float, _AT_LEAST_0]

#: a number of points, the first and the last among them
IntAboveOne = Annotated[int, ValueRange("at least 2", lambda v: v >= 2)]

#: a number of points, the first, the last and one between them among them
IntAboveTwo = Annotated[int, ValueRange("at least 3", lambda v: v >= 3)]

#: a number of points on a side, or 0 for none
IntAboveOneOrNone = Annotated[int, ValueRange("0 or at least 2", lambda v: v == 0 or v >= 2)]

#: a share that is neither nothing nor all, such as the level of an interval or a relative tolerance
OpenUnitInterval = Annotated[float, ValueRange("between 0 and 1", lambda v: 0 < v < 1)]

#: a probability, or a share that may be all or nothing
UnitInterval = Annotated[float, ValueRange("in [0, 1]", lambda v: 0 <= v <= 1)]

#: a share that may be nothing and is never all, such as label smoothing, the rate of dropped paths or a momentum
ShareBelowOne = Annotated[float, ValueRange("in [0, 1)", lambda v: 0 <= v < 1)]

#: a share that may be all and is never nothing, such as the part of a data set that is used
PositiveShare = Annotated[float, ValueRange("in (0, 1]", lambda v: 0 < v <= 1)]

#: seed of a random generator
Seed = Annotated[int, ValueRange("in 0 .. 2^63 - 1", lambda v: 0 <= v < 2**63)]

#: side length of square images in pixels, or (height, width)
ImageSize = PositiveInt | tuple[PositiveInt, PositiveInt]
