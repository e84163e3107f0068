"""Options of attention maps: choices of layers and heads, and masks of objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.probe import Probe
from vitscope.diagnostics.attention._placement import Query
from vitscope.models.structure.attention_units import AttentionUnit


@dataclass(frozen=True)
class MapOptions:
    """Options of `attention_maps`, where they are explained.

    Attributes:
        images: Number of images whose maps are kept.
        query: Query whose attention is mapped.
        layers: Names or numbers of units; None for all.
        heads: Numbers of heads; None for all.
        mass: Share of a map's attention that its mask holds.
        gradient: Whether gradients for a class are followed.
        class_index: The class; None for the model's own decision.
    """

    images: int
    query: Query
    layers: Sequence[int | str] | None
    heads: Sequence[int] | None
    mass: float
    gradient: bool
    class_index: int | None


def check_choices(layers: Sequence[int | str] | None, heads: Sequence[int] | None) -> None:
    """Raise ValueError where no layer or no head is chosen; None stands for all."""
    if layers is not None and not layers:
        raise ValueError("Expected at least one layer, received none; pass layers=[-1] for the last.")
    if heads is not None and not heads:
        raise ValueError("Expected at least one head, received none; pass heads=[0].")


def chosen_layers(units: Sequence[AttentionUnit], layers: Sequence[int | str] | None) -> list[int]:
    """Return the places of the chosen layers in ``units``, by depth.

    Args:
        units: All units whose attention can be read.
        layers: Names, or numbers from 0, negative ones from the end; None for all.

    Raises:
        ValueError: One that is not there.
    """
    if layers is None or not units:
        return list(range(len(units)))
    names = [unit.name for unit in units]
    places = set()
    for layer in layers:
        if layer in names:
            places.add(names.index(str(layer)))
        elif isinstance(layer, int) and -len(units) <= layer < len(units):
            places.add(layer % len(units))
        else:
            raise ValueError(
                f"Expected layers as numbers below {len(units)} or names such as {names[-1]!r}, received {layer!r}; pass "
                f"layers=[{len(units) - 1}]."
            )
    return sorted(places)


def chosen_heads(units: Sequence[AttentionUnit], heads: Sequence[int] | None) -> list[list[int]]:
    """Return the chosen heads of each unit.

    Args:
        units: The chosen units.
        heads: Numbers from 0; None for all of each unit.

    Raises:
        ValueError: One that a unit does not have.
    """
    if heads is None:
        return [list(range(unit.n_heads)) for unit in units]
    for unit in units:
        unknown = [head for head in heads if not (isinstance(head, int) and 0 <= head < unit.n_heads)]
        if unknown:
            raise ValueError(
                f"Expected heads in 0 .. {unit.n_heads - 1} of {unit.name!r}, received {unknown[0]!r}; pass heads=[0]."
            )
    return [sorted(set(heads)) for _ in units]


def object_masks(probe: Probe, masks: Any) -> Tensor | None:
    """Return masks of objects (n_images, H, W) as booleans: those given, else those of the data set, None without either.

    Raises:
        ValueError: Masks of another form or number, or batches whose sizes do not tell the images of each apart.
    """
    masks = masks if masks is not None else probe.about.get("object_mask")
    if masks is None:
        return None
    tensor = torch.as_tensor(np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks))
    expected = f"({probe.n_images}, H, W)"
    if tensor.ndim != 3 or len(tensor) != probe.n_images:
        raise ValueError(f"Expected masks of shape {expected}, received {tuple(tensor.shape)}.")
    sizes = [len(x) for x, _ in probe.iter_batches()]
    if any(size != probe.batch_size for size in sizes[:-1]):
        raise ValueError(f"Expected batches of one size for masks, the last excepted, received sizes {sizes}.")
    return tensor > 0
