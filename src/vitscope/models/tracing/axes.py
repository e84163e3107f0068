"""Meaning of a tensor's axes, carried from call to call: batch, channels, rows, columns, tokens.

Axes are known from convolutions on and are followed through permutations, reshapes, slices and concatenations. What cuts
positions into pieces (windows) makes them unknown until an addition to a map whose axes are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from vitscope.core.tap import Layout

Axis = Literal["B", "C", "H", "W", "L", "?"]
_LAYOUTS: dict[str, Layout] = {"BCHW": "NCHW", "BHWC": "NHWC", "BLC": "NLC", "BCL": "NCL", "LBC": "LNC"}


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
    return Axes({4: "BCHW", 3: "BCL", 2: "BC"}.get(len(shape), "?" * len(shape)), None, 0)


def permuted(axes: Axes, order: Sequence[int]) -> Axes:
    """Return the axes after a permutation."""
    return Axes("".join(axes.names[i] for i in order), axes.grid, axes.n_prefix)


def reshaped(axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """Return the axes after a reshape; rows and columns that are joined become tokens, and the reverse."""
    names: list[str] = []
    grid, n_prefix = axes.grid, axes.n_prefix
    i = j = 0
    while j < len(after):
        if i >= len(before):  # axes of size 1 at the end
            names.append("?")
            j += 1
            continue
        i_end, j_end = i + 1, j + 1
        while (n_before := prod(before[i:i_end])) != (n_after := prod(after[j:j_end])):
            if n_before < n_after and i_end < len(before):
                i_end += 1
            elif n_after < n_before and j_end < len(after):
                j_end += 1
            else:
                return unknown(len(after))
        joined, n_new = axes.names[i:i_end], j_end - j
        if len(joined) > 1 and joined[0] == "B" and n_new == 1:  # one image, whose rows become those of the batch
            joined, i = joined[1:], i + 1
        if n_new > 1 and after[j] == 1 and len(joined) == 1 and joined in "LH":
            names.append("B")
            j, n_new = j + 1, n_new - 1
        if len(joined) == n_new == 1:
            names.append(joined)
        elif joined == "HW" and n_new == 1:
            names.append("L")
            grid, n_prefix = (before[i], before[i + 1]), 0
        elif joined == "L" and n_new == 2 and grid == tuple(after[j:j_end]) and not n_prefix:
            names += ["H", "W"]
        elif joined in ("H", "W") and n_new == 2:
            names += [joined, "?"]  # rows of patches, as where neighboring pixels become channels
        elif joined == "C":  # heads, or parts such as queries and keys
            names += ["?"] * (n_new - 1) + ["C"]
        elif n_new == 1 and joined.endswith("C") and set(joined[:-1]) == {"?"}:
            names.append("C")
        else:
            names += ["?"] * n_new
        i, j = i_end, j_end
    return Axes("".join(names), grid if "L" in names else None, n_prefix if "L" in names else 0)


def multiplied(first: Axes, second: Axes) -> Axes:
    """Return the axes of a matrix product: rows of the first factor, columns of the second."""
    names = first.names[:-1] + second.names[-1:]
    has_tokens = "L" in first.names[:-1]
    return Axes(names, first.grid if has_tokens else None, first.n_prefix if has_tokens else 0)


def indexed(axes: Axes, shape: Sequence[int], index: Any) -> Axes:
    """Return the axes after ``tensor[index]`` with integers, slices, None and an ellipsis; unknown ones for others."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(e, int | slice | type(None) | type(Ellipsis)) and not isinstance(e, bool) for e in entries):
        return Axes("")
    n_axes = sum(isinstance(e, int | slice) for e in entries)
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (len(shape) - n_axes)
    names, axis = "", 0
    grid, n_prefix = axes.grid, axes.n_prefix
    for entry in entries:
        if entry is None:
            names += "?"
            continue
        name, size = axes.names[axis], shape[axis]
        axis += 1
        if isinstance(entry, int):
            continue
        if name == "L" and entry != slice(None):
            start, stop, step = entry.indices(size)
            keeps_grid = step == 1 and start <= n_prefix and stop == size
            name, n_prefix = ("L", n_prefix - start) if keeps_grid else ("?", 0)
        names += name
    names += axes.names[axis:]
    return Axes(names, grid if "L" in names else None, n_prefix if "L" in names else 0)


def pieces(axes: Axes, shapes: Sequence[Sequence[int]], axis: int) -> list[Axes]:
    """Return the axes of the pieces along an axis; of tokens, the last piece has the grid if the others are prefix tokens."""
    axis %= len(axes.names)
    if axes.names[axis] != "L":
        return [axes for _ in shapes]
    results, start = [], 0
    for k, shape in enumerate(shapes):
        keeps_grid = start <= axes.n_prefix and k == len(shapes) - 1
        names = axes.names if keeps_grid else axes.names[:axis] + "?" + axes.names[axis + 1 :]
        results.append(Axes(names, axes.grid if keeps_grid else None, axes.n_prefix - start if keeps_grid else 0))
        start += shape[axis]
    return results


def joined(parts: Sequence[tuple[Axes, Sequence[int]]], axis: int) -> Axes:
    """Return the axes of a concatenation: tokens in front of a sequence with a grid are prefix tokens."""
    axis %= len(parts[0][1])
    sequences = [k for k, (axes, _) in enumerate(parts) if axes.names[axis] == "L"]
    if len(sequences) == 1 and sequences[0] == len(parts) - 1:
        axes = parts[-1][0]
        return Axes(axes.names, axes.grid, axes.n_prefix + sum(shape[axis] for _, shape in parts[:-1]))
    best = max((axes for axes, _ in parts), key=lambda axes: len(axes.names) - axes.names.count("?"))
    if best.names[axis] in "HWL?":
        names = best.names[:axis] + "?" + best.names[axis + 1 :]
        return Axes(names)
    return best
