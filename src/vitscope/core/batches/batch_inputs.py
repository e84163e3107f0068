"""Entries of a batch that is more than one tensor of images, cut along the images and moved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class BatchInputs:
    """A batch of several entries, as a network's ``forward`` takes it; it has the length and the slices of its images.

    A tensor whose first axis has as many entries as there are images is cut with them; any other entry is handed over whole.

    Args:
        entries: Entries of the batch, by key or by place.
        n_images: Number of images.
    """

    def __init__(self, entries: Mapping[Any, Any] | Sequence[Any], n_images: int) -> None:
        self.entries = dict(entries) if isinstance(entries, Mapping) else tuple(entries)
        self.n_images = n_images

    @property
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors, in order."""
        return [value for value in self._values if isinstance(value, Tensor)]

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor."""
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor that is cut."""
        return self.cut_tensors[0].device

    @property
    def cut_tensors(self) -> list[Tensor]:
        """The tensors that have one row per image."""
        return [t for t in self.tensors if t.ndim and len(t) == self.n_images]

    def __len__(self) -> int:
        """Return the number of images."""
        return self.n_images

    def __getitem__(self, part: slice) -> BatchInputs:
        """Return the batch of some of the images."""
        n_images = len(range(self.n_images)[part])

        def cut(value: Any) -> Any:
            return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == self.n_images else value

        return BatchInputs(self._mapped(cut), n_images)

    def map(self, change: Callable[[Tensor], Tensor]) -> BatchInputs:
        """Return the batch with ``change`` applied to each tensor."""
        return BatchInputs(self._mapped(lambda v: change(v) if isinstance(v, Tensor) else v), self.n_images)

    def clone(self) -> BatchInputs:
        """Return the batch with copies of its tensors."""
        return self.map(torch.clone)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BatchInputs:
        """Return the batch on a device, floating-point tensors in ``dtype``."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    @property
    def _values(self) -> Iterable[Any]:
        return self.entries.values() if isinstance(self.entries, dict) else self.entries

    def _mapped(self, change: Callable[[Any], Any]) -> Mapping[Any, Any] | Sequence[Any]:
        if isinstance(self.entries, dict):
            return {key: change(value) for key, value in self.entries.items()}
        return [change(value) for value in self.entries]


#: images of one batch, or the batch of a network that takes more
Inputs = Tensor | BatchInputs


def tensors_of(inputs: Any) -> list[Tensor]:
    """Return the tensors of one argument of a network."""
    if isinstance(inputs, BatchInputs):
        return inputs.tensors
    return [inputs] if isinstance(inputs, Tensor) else []


def image_shapes(inputs: Inputs) -> str:
    """Return the shape of one image of a batch in words, ``3 x 224 x 224``; one for each entry with one row an image."""
    tensors = inputs.cut_tensors if isinstance(inputs, BatchInputs) else [inputs]
    return ", ".join(" x ".join(map(str, t.shape[1:])) or "scalar" for t in tensors)


def images_of(inputs: Inputs, measure: str) -> Tensor:
    """Return the images of a batch ``(B, C, H, W)``: its inputs themselves, or the one entry of that shape.

    Raises:
        ValueError: None or several entries of that shape.
    """
    if isinstance(inputs, Tensor):
        return inputs
    images = [t for t in inputs.cut_tensors if t.ndim == 4 and t.is_floating_point()]
    if len(images) != 1:
        raise ValueError(
            f"{measure} needs the size of the images and one entry (B, C, H, W) in each batch, received entries of shapes "
            f"{inputs.shape}."
        )
    return images[0]


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the inputs of several batches as one.

    Raises:
        ValueError: Batches that hold different entries.
    """
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    batches = [part for part in parts if isinstance(part, BatchInputs)]
    keys = list(parts[0].entries) if isinstance(parts[0].entries, dict) else range(len(parts[0].entries))
    if any(len(batch.entries) != len(keys) for batch in batches):
        raise ValueError("Expected batches of the same entries to join, received different ones: use batch_sizes=().")
    entries = []
    for key in keys:
        values = [batch.entries[key] for batch in batches]
        rows = all(isinstance(v, Tensor) and v.ndim and len(v) == len(b) for v, b in zip(values, batches))
        entries.append(torch.cat(values) if rows else values[0])
    n_images = sum(map(len, batches))
    return BatchInputs(dict(zip(keys, entries)) if isinstance(parts[0].entries, dict) else entries, n_images)


def selected_images(inputs: Inputs, indices: Sequence[int]) -> Inputs:
    """Return the inputs of some images of a batch, in the order of ``indices``, at least one."""
    if isinstance(inputs, Tensor):
        return inputs[list(indices)]
    return joined([inputs[i : i + 1] for i in indices])
