"""Labels of axes of units: which axes of tensors must be permuted alike.

A label stands for an axis of channels. Two axes that meet in an addition or a product of elements share a label. The axis of a
layer that is cut into queries, keys and values, or into heads, has parts with labels of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Label:
    """An axis of channels.

    Attributes:
        size: Number of channels.
        origin: Name of the first parameter that has the axis, or of the module that made it.
        fixed: Why the channels stay in place; empty where they may be permuted.
        blocks: Labels of the parts of which the axis is the concatenation, such as queries, keys and values.
        heads: Labels of its heads and of the channels of each head, whose product the axis is.
        head: For channels of heads, the label of the heads: each head permutes its channels in its own way.
        parent: The label that it was merged with; read it through `root`.
    """

    size: int
    origin: str
    fixed: str = ""
    blocks: tuple[Label, ...] = ()
    heads: tuple[Label, Label] | None = None
    head: Label | None = field(default=None, repr=False)
    parent: Label | None = field(default=None, repr=False)

    @property
    def root(self) -> Label:
        """The label that stands for this one and all that it was merged with."""
        label = self
        while label.parent is not None:
            label = label.parent
        return label


def fix(label: Label, reason: str) -> None:
    """Leave the channels of a label, and of its parts, in place."""
    label = label.root
    label.fixed = label.fixed or reason
    for part in (*label.blocks, *(label.heads or ())):
        if not part.root.fixed:
            fix(part, reason)


def merge(first: Label, second: Label) -> Label:
    """Make two labels one: what permutes the one permutes the other. Return the common label.

    Labels that are cut differently, or differ in size, stay in place.
    """
    a, b = first.root, second.root
    if a is b:
        return a
    if a.size != b.size:
        reason = f"{a.origin} ({a.size} channels) meets {b.origin} ({b.size})"
        fix(a, reason)
        fix(b, reason)
        return a
    b.parent = a
    if a.head is not None and b.head is not None:
        merge(a.head, b.head)
    a.head = a.head or b.head
    if not is_cut(a):
        a.blocks, a.heads = b.blocks, b.heads
    elif is_cut(b):
        _merge_parts(a, b)
    if reason := a.fixed or b.fixed:
        a.fixed = reason
        for part in (*a.blocks, *(a.heads or ())):
            fix(part, reason)
    return a


def is_cut(label: Label) -> bool:
    """Tell whether a label has parts."""
    return bool(label.blocks) or label.heads is not None


def _merge_parts(a: Label, b: Label) -> None:
    if [p.size for p in a.blocks] != [p.size for p in b.blocks] or (a.heads is None) != (b.heads is None):
        a.fixed = a.fixed or f"{a.origin} and {b.origin} are cut differently"
        for part in (*b.blocks, *(b.heads or ())):
            fix(part, a.fixed)
        return
    pairs = list(zip(a.blocks, b.blocks))
    if a.heads is not None and b.heads is not None:
        if a.heads[0].size == b.heads[0].size:
            pairs += zip(a.heads, b.heads)
        else:
            a.fixed = a.fixed or f"{a.origin} and {b.origin} have different heads"
    for one, other in pairs:
        merge(one, other)


def cut_into_blocks(label: Label, sizes: tuple[int, ...]) -> tuple[Label, ...]:
    """Return the labels of consecutive parts of an axis; those of a label that is cut otherwise stay in place."""
    label = label.root
    if not is_cut(label):
        label.blocks = tuple(Label(size, f"{label.origin}[{i}]", label.fixed) for i, size in enumerate(sizes))
    if tuple(p.size for p in label.blocks) != sizes:
        fix(label, f"{label.origin} is cut in two ways")
        return tuple(Label(size, label.origin, f"{label.origin} is cut in two ways") for size in sizes)
    return label.blocks


def cut_into_heads(label: Label, n_heads: int) -> tuple[Label, Label]:
    """Return the labels of the heads of an axis and of the channels of each head."""
    label = label.root
    if not is_cut(label):
        heads = Label(n_heads, f"heads of {label.origin}", label.fixed)
        size = label.size // n_heads
        label.heads = heads, Label(size, f"channels of the heads of {label.origin}", label.fixed, head=heads)
    if label.heads is None or label.heads[0].size != n_heads:
        reason = f"{label.origin} is cut in two ways"
        fix(label, reason)
        return Label(n_heads, label.origin, reason), Label(label.size // n_heads, label.origin, reason)
    return label.heads


def leaves(label: Label) -> Iterator[Label]:
    """Yield the labels of the parts that are not cut further, each as its root."""
    label = label.root
    if not is_cut(label):
        yield label
    for part in (*label.blocks, *(label.heads or ())):
        yield from leaves(part)
