"""Rules for what a function does with labeled axes: where labels go, and which of them it makes one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitscope.models.permutations.channel_labels import Label, cut_into_blocks, cut_into_heads, fix, merge
from vitscope.models.tracing.axes import index_entries, matching_parts


@dataclass(frozen=True, eq=False)
class Stacked:
    """An axis of a tensor in which queries, keys and values still stand one after the other.

    Attributes:
        labels: The labels of this axis in each of the parts.
        is_index: Whether it is the axis that counts the parts; the labels are then those of the parts.
    """

    labels: tuple[Label, ...]
    is_index: bool


#: label of an axis: its channels, or None for an axis whose places have a meaning (images, positions, classes)
Axis = Label | Stacked | None
Axes = tuple[Axis, ...]


def plain(axes: Axes) -> tuple[Label | None, ...]:
    """Return axes without stacks: the parts of a stack are made one."""
    return tuple(_unstacked(axis) for axis in axes)


def _unstacked(axis: Axis) -> Label | None:
    if not isinstance(axis, Stacked):
        return axis
    if axis.is_index:
        return None
    for other in axis.labels[1:]:
        merge(axis.labels[0], other)
    return axis.labels[0]


def joined(first: Label | None, second: Label | None, place_name: str) -> Label | None:
    """Return the label of an axis at which two axes meet; channels that meet an axis of another meaning stay in place."""
    if first is None or second is None:
        for label in (first, second):
            if label is not None:
                fix(label, place_name)
        return None
    return merge(first, second)


def broadcast(operands: Sequence[tuple[Axes, Sequence[int]]], shape: Sequence[int], place_name: str) -> Axes:
    """Return the axes of a function of elements, whose operands (axes, shape) broadcast to ``shape``."""
    result: list[Label | None] = []
    for place in range(1, len(shape) + 1):  # from the last axis on
        meeting = [plain(axes)[-place] for axes, sizes in operands if len(sizes) >= place and sizes[-place] > 1]
        label = meeting[0] if meeting else None
        for other in meeting[1:]:
            label = joined(label, other, place_name)
        result.append(label)
    return tuple(result[::-1])


def fix_all(axes: Axes, place_name: str) -> None:
    """Leave all channels of a tensor in place."""
    for label in plain(axes):
        if label is not None:
            fix(label, place_name)


def reshaped(axes: Axes, before: Sequence[int], after: Sequence[int], place_name: str) -> Axes:
    """Return the axes after a reshape: an axis may be cut into heads, and heads become one axis again.

    Raises:
        ValueError: The shapes have different numbers of entries.
    """
    # axes of size 1 have no channels, wherever they are added or removed
    old_axes = [axis for axis, size in zip(axes, before) if size > 1]
    old_sizes, new_sizes = ([size for size in shape if size > 1] for shape in (before, after))
    regrouped: list[Axis] = []
    for old, new in matching_parts(old_sizes, new_sizes):
        regrouped += _regrouped(old_axes[old], old_sizes[old], new_sizes[new], place_name)
    new_axes = iter(regrouped)
    return tuple(next(new_axes) if size > 1 else None for size in after)


def _regrouped(old: list[Axis], before: list[int], after: list[int], place_name: str) -> list[Axis]:
    """Return the axes (of more than one entry) into which those of one part of a shape are regrouped."""
    if before == after:
        return old
    if len(old) == 1 and isinstance(old[0], Label):
        label = old[0]
        if len(after) == 2:
            return list(cut_into_heads(label, after[0]))
        if len(after) == 3:  # queries, keys and values, each of several heads
            blocks = cut_into_blocks(label, (math.prod(after[1:]),) * after[0])
            heads, channels = zip(*(cut_into_heads(block, after[1]) for block in blocks))
            return [Stacked(blocks, True), Stacked(heads, False), Stacked(channels, False)]
    labels = plain(tuple(old))
    if len(after) == 1 and len(labels) == 2:
        heads, channels = labels
        head = channels.root.head if channels is not None else None
        if heads is not None and channels is not None and head is not None and head.root is heads.root:
            merged = Label(after[0], f"heads of {channels.root.origin}")
            merged.heads = (heads, channels)
            return [merged]
    for label in labels:
        if label is not None:
            fix(label, f"{place_name} regroups its channels with other axes")
    return [None] * len(after)


def selected(axes: Axes, dim: int, place: int, place_name: str) -> Axes:
    """Return the axes of one slice of a tensor along ``dim``."""
    axis = axes[dim]
    rest = axes[:dim] + axes[dim + 1 :]
    if isinstance(axis, Stacked) and axis.is_index:
        return tuple(a.labels[place] if isinstance(a, Stacked) else a for a in rest)
    if axis is not None:
        fix_all((axis,), f"{place_name} takes single channels")
    return rest


def indexed(axes: Axes, index: Any, place_name: str) -> Axes:
    """Return the axes after ``tensor[index]`` with integers, slices, ``None``, an ellipsis, and at most one index tensor.

    Raises:
        TypeError: Another index.
    """
    entries = index_entries(index, len(axes))
    _check_index(entries)
    result, dim = axes, 0  # the axes from ``dim`` on are still to be indexed
    for entry in entries:
        if entry is None:
            result = (*result[:dim], None, *result[dim:])
            dim += 1
        elif isinstance(entry, slice):
            if entry != slice(None):
                fix_all((result[dim],), f"{place_name} takes a part of its channels")
                result = (*result[:dim], None, *result[dim + 1 :])
            dim += 1
        elif isinstance(entry, int):
            result = selected(result, dim, entry, place_name)
        else:  # a tensor, whose axes replace the one that it indexes
            fix_all((result[dim],), f"{place_name} takes single channels")
            result = (*result[:dim], *(None,) * entry.ndim, *result[dim + 1 :])
            dim += entry.ndim
    return result


def _check_index(entries: Sequence[Any]) -> None:
    """Raise TypeError for an index by truth values, by several tensors or by lists."""
    index_tensors = [entry for entry in entries if hasattr(entry, "ndim")]
    others = [entry for entry in entries if not hasattr(entry, "ndim")]
    if len(index_tensors) > 1 or any("bool" in str(entry.dtype) for entry in index_tensors):
        raise TypeError("Expected an index by at most one tensor, of integers, received another.")
    if any(isinstance(entry, bool) or not isinstance(entry, int | slice | None) for entry in others):
        raise TypeError("Expected an index of integers, slices and None, received another.")


def check_heads(axes: Axes, place_name: str) -> None:
    """Leave the channels of heads in place where a tensor has them without the axis of their heads."""
    present = set[Label]()
    for axis in axes:
        labels = axis.labels if isinstance(axis, Stacked) else (axis,)
        present.update(label.root for label in labels if label is not None)
    for axis in axes:
        if isinstance(axis, Label) and axis.root.head is not None and axis.root.head.root not in present:
            fix(axis, f"{place_name} treats the channels of all heads alike")
