"""Meaning of a tensor's axes, carried from call to call: batch, channels, rows, columns, tokens.

Axes are known from convolutions on and are followed through permutations, reshapes, slices and concatenations. What cuts
positions into pieces (windows) makes them unknown until an addition to a map whose axes are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from vitscope.core.tap import Layout
from vitscope.models.structure.execution import argument

Axis = Literal["B", "C", "H", "W", "L", "?"]
_LAYOUTS: dict[str, Layout] = {"BCHW": "NCHW", "BHWC": "NHWC", "BLC": "NLC", "BCL": "NCL", "LBC": "LNC"}
#: names of the two arguments of functions that exchange or move axes
_AXIS_ARGUMENTS = {
    "transpose": ("dim0", "dim1"),
    "swapdims": ("dim0", "dim1"),
    "swapaxes": ("axis0", "axis1"),
    "movedim": ("source", "destination"),
    "moveaxis": ("source", "destination"),
}


@dataclass(frozen=True)
class Axes:
    """Meaning of each axis.

    Attributes:
        names: One of ``B C H W L`` (tokens in the order of rows) or ``?`` for each axis.
        grid: Rows and columns of the tokens of an axis ``L``.
        n_prefix: Tokens in front of the grid.
    """

    names: str
    grid: tuple[int, int] | None = None
    n_prefix: int = 0

    @property
    def layout(self) -> Layout | None:
        """The layout of a map or a sequence; None where an axis is not known."""
        return _LAYOUTS.get(self.names)

    @property
    def channel(self) -> int | None:
        """Index of the channels; None where they are not known."""
        return self.names.index("C") if "C" in self.names else None

    @property
    def n_known(self) -> int:
        """Number of axes whose meaning is known."""
        return len(self.names) - self.names.count("?")

    def renamed(self, names: str) -> Axes:
        """Return axes of other names; the grid and the prefix tokens stay with an axis of tokens."""
        return Axes(names, self.grid, self.n_prefix) if "L" in names else Axes(names)


def unknown(n_axes: int) -> Axes:
    """Return axes of which none is known."""
    return Axes("?" * n_axes)


def channels_last(axes: Axes) -> Axes:
    """Return the axes of a tensor whose last one holds channels where none is known to do so."""
    names = list(axes.names)
    if "C" not in names and names.count("L") < 2:  # a matrix of tokens by tokens has heads for its last axis
        names[-1] = "C"
    return Axes("".join(names), axes.grid, axes.n_prefix)


def channels_first(shape: Sequence[int]) -> Axes:
    """Return the axes of a map or sequence with channels behind the batch."""
    return Axes({4: "BCHW", 3: "BCL", 2: "BC"}.get(len(shape), "?" * len(shape)))


def permuted(axes: Axes, order: Sequence[int]) -> Axes:
    """Return the axes after a permutation."""
    return Axes("".join(axes.names[i] for i in order), axes.grid, axes.n_prefix)


def axis_order(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], n_axes: int) -> list[int]:
    """Return which axis of the operand each axis of the result is, for a function that permutes axes.

    Args:
        op: Name of the function: ``permute``, ``transpose``, ``movedim``, their other names, or an attribute such as ``mT``.
        args: Positional arguments of the call, the operand first.
        kwargs: Keyword arguments of the call.
        n_axes: Number of axes of the operand.

    Raises:
        TypeError: The call names its axes by arguments that are not known.
    """
    order = list(range(n_axes))
    if op in ("t", "T", "H"):
        return order[::-1]
    if op in ("mT", "mH"):
        return [*order[:-2], order[-1], order[-2]]
    if op == "permute":
        is_one_argument = len(args) == 2 and isinstance(args[1], tuple | list)
        dims = args[1] if is_one_argument else args[1:] or argument(args, kwargs, 1, "dims")
        return [int(dim) % n_axes for dim in dims]
    argument_names = _AXIS_ARGUMENTS[op]
    first, second = (argument(args, kwargs, k, name) % n_axes for k, name in enumerate(argument_names, start=1))
    if op in ("movedim", "moveaxis"):
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = second, first
    return order


def matching_parts(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the shortest parts of two shapes that hold the same number of entries, from the first axes on.

    A reshape regroups the axes of such a part among themselves. Axes of size 1 at the end of a shape may be in no part.

    Raises:
        ValueError: The shapes have different numbers of entries.
    """
    i = j = 0
    while i < len(before) and j < len(after):
        i_end, j_end = i + 1, j + 1
        while (n_before := prod(before[i:i_end])) != (n_after := prod(after[j:j_end])):
            if n_before < n_after and i_end < len(before):
                i_end += 1
            elif n_after < n_before and j_end < len(after):
                j_end += 1
            else:
                raise ValueError(f"Expected shapes of one number of entries, received {before} and {after}.")
        yield slice(i, i_end), slice(j, j_end)
        i, j = i_end, j_end


def reshaped(axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """Return the axes after a reshape; rows and columns that are joined become tokens, and the reverse.

    Raises:
        ValueError: The shapes have different numbers of entries.
    """
    names, grid, n_prefix = "", axes.grid, axes.n_prefix
    for old, new in matching_parts(before, after):
        old_names = axes.names[old]
        new_names = _reshaped_names(old_names, after[new], None if n_prefix else grid)
        if new_names == "L" and old_names.endswith("HW"):
            grid, n_prefix = (before[old][-2], before[old][-1]), 0
        names += new_names
    names += "?" * (len(after) - len(names))  # axes of size 1 at the end
    return Axes(names, grid, n_prefix).renamed(names)


def _reshaped_names(names: str, sizes: Sequence[int], grid: tuple[int, int] | None) -> str:
    """Return the names of the axes into which a reshape turns some axes, after those of one image are told apart.

    Args:
        names: Names of the axes before.
        sizes: Sizes of the axes after.
        grid: Rows and columns of tokens without prefix tokens; None where they are not known.
    """
    if len(names) > 1 and names[0] == "B" and len(sizes) == 1:  # one image, whose rows become those of the batch
        return _regrouped_names(names[1:], sizes, grid)
    if names in ("L", "H") and len(sizes) > 1 and sizes[0] == 1:  # the rows are given back their batch of one image
        return "B" + _regrouped_names(names, sizes[1:], grid)
    return _regrouped_names(names, sizes, grid)


def _regrouped_names(names: str, sizes: Sequence[int], grid: tuple[int, int] | None) -> str:
    """Return the names of the axes into which a reshape turns some axes; arguments as of `_reshaped_names`."""
    n_axes = len(sizes)
    if len(names) == n_axes == 1:
        return names
    if names == "HW" and n_axes == 1:
        return "L"
    if names == "L" and tuple(sizes) == grid:
        return "HW"
    if names in ("H", "W") and n_axes == 2:  # rows of patches, as where neighboring pixels become channels
        return names + "?"
    if names == "C":  # heads, or parts such as queries and keys
        return "?" * (n_axes - 1) + "C"
    if n_axes == 1 and names.endswith("C") and set(names[:-1]) == {"?"}:
        return "C"
    return "?" * n_axes


def multiplied(first: Axes, second: Axes) -> Axes:
    """Return the axes of a matrix product: rows of the first factor, columns of the second."""
    names = first.names[:-1] + second.names[-1:]
    if "L" in first.names[:-1]:
        return Axes(names, first.grid, first.n_prefix)
    return Axes(names)


def index_entries(index: Any, n_axes: int) -> list[Any]:
    """Return the entries of an index of a tensor with ``n_axes`` axes, whole slices in place of an ellipsis."""
    entries = list(index) if isinstance(index, tuple) else [index]
    for place, entry in enumerate(entries):
        if entry is Ellipsis:
            n_indexed = sum(other is not None and other is not Ellipsis for other in entries)
            return entries[:place] + [slice(None)] * (n_axes - n_indexed) + entries[place + 1 :]
    return entries


def indexed(axes: Axes, shape: Sequence[int], index: Any) -> Axes:
    """Return the axes after ``tensor[index]`` with integers, slices, None and an ellipsis.

    Raises:
        TypeError: Another index, such as a tensor.
    """
    names, n_prefix = "", axes.n_prefix
    axis = 0  # of the tensor before
    for entry in index_entries(index, len(shape)):
        if entry is None:
            names += "?"
            continue
        if isinstance(entry, bool) or not isinstance(entry, int | slice):
            raise TypeError(f"Expected an index of integers and slices, received a {type(entry).__name__}.")
        name, size = axes.names[axis], shape[axis]
        axis += 1
        if isinstance(entry, int):
            continue
        if name == "L" and entry != slice(None):
            start, stop, step = entry.indices(size)
            if step == 1 and start <= n_prefix and stop == size:  # prefix tokens are cut off
                n_prefix -= start
            else:
                name, n_prefix = "?", 0
        names += name
    names += axes.names[axis:]
    return Axes(names, axes.grid, n_prefix).renamed(names)


def pieces(axes: Axes, shapes: Sequence[Sequence[int]], axis: int) -> list[Axes]:
    """Return the axes of the pieces along an axis; of tokens, the last piece has the grid if the others are prefix tokens."""
    axis %= len(axes.names)
    if axes.names[axis] != "L":
        return [axes for _ in shapes]
    results, start = [], 0
    for k, shape in enumerate(shapes):
        if start <= axes.n_prefix and k == len(shapes) - 1:
            results.append(Axes(axes.names, axes.grid, axes.n_prefix - start))
        else:
            results.append(Axes(axes.names[:axis] + "?" + axes.names[axis + 1 :]))
        start += shape[axis]
    return results


def joined(parts: Sequence[tuple[Axes, Sequence[int]]], axis: int) -> Axes:
    """Return the axes of a concatenation: tokens in front of a sequence with a grid are prefix tokens."""
    axis %= len(parts[0][1])
    sequences = [k for k, (axes, _) in enumerate(parts) if axes.names[axis] == "L"]
    if len(sequences) == 1 and sequences[0] == len(parts) - 1:
        axes = parts[-1][0]
        return Axes(axes.names, axes.grid, axes.n_prefix + sum(shape[axis] for _, shape in parts[:-1]))
    best_known = max((axes for axes, _ in parts), key=lambda axes: axes.n_known)
    if best_known.names[axis] in "HWL?":
        return Axes(best_known.names[:axis] + "?" + best_known.names[axis + 1 :])
    return best_known
