"""Permutations of units that leave a network's function unchanged, read from one traced forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.guard.trial_pass import UntraceableError, first_that_runs, observing, trial_images
from vitscope.models.permutations.axis_recorder import Observer
from vitscope.models.permutations.channel_labels import Label, leaves
from vitscope.models.permutations.unit_recorder import UnitRecorder
from vitscope.runtime.errors import StructureError

#: reasons why an axis stays in place in every network: it is that of images, classes or places of a kernel
_EXPECTED = ("no units", "output", "places of a kernel")

#: a permutation of the channels of every label that has one: (n,), or (heads, n) for the channels of heads
Permutations = dict[Label, Tensor]


@dataclass(frozen=True)
class Occurrence:
    """A place of a group's units among the axes of a tensor.

    Attributes:
        name: Name of the parameter or buffer.
        axis: The axis.
        start: The first channel that belongs to the group.
        heads: Label of the heads; None for single units.
        label: Label of the units, or of the channels of the heads.
    """

    name: str
    axis: int
    start: int
    heads: Label | None
    label: Label

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.label.size * (1 if self.heads is None else self.heads.root.size)


@dataclass(frozen=True)
class UnitGroup:
    """Units that are permuted together.

    Attributes:
        label: Label of the units, or of heads.
        channels: Labels of the channels of each head, such as those of queries with keys, and those of values.
        occurrences: Where they are.
    """

    label: Label
    channels: tuple[Label, ...]
    occurrences: tuple[Occurrence, ...]

    @property
    def name(self) -> str:
        """Name of the group: the first parameter whose axis it is."""
        return self.label.origin


@dataclass(frozen=True)
class UnitSymmetry:
    """Axes of a network's tensors that may be permuted, in groups that must be permuted alike.

    Attributes:
        axes: The labels of the axes of each parameter and buffer, by name.
        groups: The groups of units, in the order of execution.
        fixed: Why other axes of units stay in place, by name.
        observed: The label of each tensor of activations that a pass observes, in order.
    """

    axes: Mapping[str, tuple[Label | None, ...]]
    groups: tuple[UnitGroup, ...]
    fixed: Mapping[str, str]
    observed: tuple[Label, ...]

    def identity(self) -> Permutations:
        """Return the permutations that change nothing."""
        permutations: Permutations = {}
        for group in self.groups:
            permutations[group.label] = torch.arange(group.label.size)
            for label in group.channels:
                permutations[label] = torch.arange(label.size).repeat(group.label.size, 1)
        return permutations

    def permuted(self, name: str, tensor: Tensor, permutations: Permutations, but: int = -1) -> Tensor:
        """Return a tensor with its axes permuted: entry i is the old entry p[i].

        Args:
            name: Name of the parameter or buffer.
            tensor: The parameter's values.
            permutations: By label.
            but: An axis that is left as it is.
        """
        for axis, label in enumerate(self.axes.get(name, ())):
            if axis != but and label is not None and any(leaf in permutations for leaf in leaves(label)):
                tensor = tensor.index_select(axis, _index(label, permutations).to(tensor.device))
        return tensor


def unit_symmetry(model: nn.Module, images: Tensor | None = None) -> UnitSymmetry:
    """Return the permutations of units under which a network's function does not change.

    One forward pass in eval mode follows the axes of units through its functions. Units are the channels of convolutions and
    linear layers, those of a residual stream together in all layers that it passes through, and attention heads; the channels
    of each head are permuted by head, those of queries together with those of keys. Channels that are grouped, joined with
    positions, cut, or that meet values of another meaning stay in place.

    Args:
        model: A network of any family.
        images: (B, C, H, W) that it takes; None for random ones of a size that it states.

    Raises:
        StructureError: A function through which units cannot be followed, with its module; no group of units; or a model that
            does not run.
    """
    model = unwrapped(model)
    observed: list[Label] = []
    recorder = run_recorded(model, images, lambda _, __, label: observed.append(label))
    names = [name for name in recorder.axes_of_name if name in recorder.saved_names]
    axes = {name: recorder.axes_of_name[name] for name in names}
    occurrences_of: dict[Label, list[Occurrence]] = {}
    channels: dict[Label, dict[Label, None]] = {}
    fixed: dict[str, str] = {}
    for occurrence in _occurrences(axes):
        key = (occurrence.heads or occurrence.label).root
        is_fixed = bool(key.fixed) and (occurrence.heads is None or bool(occurrence.label.root.fixed))
        if not is_fixed:
            occurrences_of.setdefault(key, []).append(occurrence)
            if occurrence.heads is not None:
                channels.setdefault(key, {}).setdefault(occurrence.label.root)
        elif not key.fixed.endswith(_EXPECTED):
            fixed.setdefault(occurrence.name, key.fixed)
    groups = tuple(
        UnitGroup(key, tuple(channels.get(key, ())), tuple(occurrences)) for key, occurrences in occurrences_of.items()
    )
    if not groups:
        raise StructureError(type(model).__name__, "no units were found that may be permuted", "use alignment=none")
    return UnitSymmetry(axes, groups, fixed, tuple(observed))


def _occurrences(axes: Mapping[str, tuple[Label | None, ...]]) -> Iterator[Occurrence]:
    """Yield the places of units and heads in all tensors."""
    for name, labels in axes.items():
        for axis, label in enumerate(labels):
            if label is not None:
                yield from places(name, axis, label)


def run_recorded(
    model: nn.Module, images: Tensor | None, observe: Observer | None = None, n_images: int = 2
) -> UnitRecorder:
    """Run a model once in eval mode and return the labels of its axes.

    Raises:
        StructureError: A function through which units cannot be followed, or a model that does not run.
    """

    def record(x: Tensor) -> UnitRecorder:
        recorder = UnitRecorder(model, x, observe)
        with observing(model), recorder.hooks():
            with recorder:
                output = model.forward(x)  # the hooks of the model itself belong to its user
            recorder.finish(output)
        return recorder

    try:
        return first_that_runs(trial_images(model, None) if images is None else (images[:n_images],), record)
    except UntraceableError as error:
        reason = f"it does not run on the images: {error}"
        raise StructureError(type(model).__name__, reason, "pass images that it takes") from error


def places(name: str, axis: int, label: Label, start: int = 0) -> Iterator[Occurrence]:
    """Yield the places of single labels and of heads in an axis that may be cut into parts."""
    label = label.root
    if label.heads is not None:
        yield Occurrence(name, axis, start, label.heads[0].root, label.heads[1].root)
    elif label.blocks:
        for block in label.blocks:
            yield from places(name, axis, block, start)
            start += block.size
    else:
        yield Occurrence(name, axis, start, None, label)


def places_within(occurrence: Occurrence, permutations: Permutations) -> Tensor:
    """Return the old place of each channel of an occurrence among its channels, (n,)."""
    heads, label = occurrence.heads, occurrence.label
    return _index(label if heads is None else Label(occurrence.size, "", heads=(heads, label)), permutations)


def _index(label: Label, permutations: Permutations) -> Tensor:
    """Return the old place of each channel of an axis."""
    label = label.root
    if label.heads is not None:
        heads, channels = label.heads[0].root, label.heads[1].root
        order = permutations.get(heads, torch.arange(heads.size))
        within = permutations.get(channels, torch.arange(channels.size).repeat(heads.size, 1))
        return (order[:, None] * channels.size + within).flatten()  # (heads, channels) to one axis
    if label.blocks:
        pieces, start = [], 0
        for block in label.blocks:
            pieces.append(_index(block, permutations) + start)
            start += block.size
        return torch.cat(pieces)
    return permutations.get(label, torch.arange(label.size))
