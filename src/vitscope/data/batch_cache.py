"""Caches of a probe's decoded batches: in the host's memory, on the model's device, or in a file without a name.

A search for eigenvalues passes over all batches once a product, a loss surface once a point. A cache keeps the transformed
tensors of the first pass, so that each image is read and decoded once; it changes no bit of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vitscope.data.cache_choices import check_choice
from vitscope.linalg import basis_memory
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.text_layout import size_text

Batch = tuple[Tensor, Tensor]

#: ``auto`` keeps batches of at most this many bytes whatever is free, and larger ones up to `AUTO_SHARE` of the free memory
SMALL_BYTES = 512 * 2**20
AUTO_SHARE = 0.25


class BatchStore(Protocol):
    """Keeps batches by number."""

    def get(self, index: int) -> Batch | None:
        """Return a batch that nobody else holds, None for one that was not put."""
        ...

    def put(self, index: int, batch: Batch) -> None:
        """Keep a batch; the tensors are the store's from now on."""
        ...


class MemoryStore:
    """Batches in memory.

    Args:
        place: Device on which batches are kept; the CPU for the host's memory.
        device: Device on which `get` returns them. Host memory for a GPU is page-locked, so that copies to it are fast.
    """

    def __init__(self, place: torch.device, device: torch.device) -> None:
        self._place, self._device = place, device
        self._is_pinned = place.type == "cpu" and device.type == "cuda"
        self._batches: dict[int, Batch] = {}

    def get(self, index: int) -> Batch | None:
        """Return copies on the device, None for a batch that was not put."""
        batch = self._batches.get(index)
        if batch is None:
            return None
        x, y = (t.to(self._device, non_blocking=self._is_pinned, copy=True) for t in batch)
        return x, y

    def put(self, index: int, batch: Batch) -> None:
        """Keep a batch."""
        x, y = (t.pin_memory() if self._is_pinned else t.to(self._place) for t in batch)
        self._batches[index] = x, y


class DiskStore:
    """Batches in a mapped file of the folder for temporary files (``TMPDIR``); it has no name and ends with the process.

    Args:
        n_bytes: Bytes of all batches; they are reserved, so that writing cannot fail.
        device: Device on which `get` returns them.

    Raises:
        StorageError: The disk has no space.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._bytes = basis_memory.file_tensor(
            n_bytes, "probe.cache", "set TMPDIR to a larger disk, or probe.cache=none"
        )
        self._device = device
        self._end = 0
        self._entries: dict[int, list[tuple[int, torch.Size, torch.dtype]]] = {}

    def get(self, index: int) -> Batch | None:
        """Return copies on the device, None for a batch that was not put."""
        if index not in self._entries:
            return None
        x, y = (self._read(*entry) for entry in self._entries[index])
        return x, y

    def put(self, index: int, batch: Batch) -> None:
        """Write a batch behind the others."""
        self._entries[index] = [self._write(tensor) for tensor in batch]

    def _read(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        piece = self._bytes[start : start + shape.numel() * dtype.itemsize]
        return piece.clone().view(dtype).view(shape).to(self._device)  # bytes (n,) to the tensor's type and shape

    def _write(self, tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        start, end = self._end, self._end + len(raw)
        if end > len(self._bytes):
            raise ValueError(f"Expected batches of {len(self._bytes)} bytes together, received {end} or more.")
        self._bytes[start:end].copy_(raw)
        self._end = end
        return start, tensor.shape, tensor.dtype


def choose_place(choice: str, n_bytes: int, device: torch.device) -> str:
    """Return where batches are kept: ``none``, ``host``, ``device`` or ``disk``.

    Args:
        choice: One of `vitscope.data.cache_choices.CHOICES`. On the CPU ``device`` is ``host``.
        n_bytes: Bytes of all batches. Under ``torch.distributed`` each rank may keep all of them, since some measures divide
            points and not batches among the ranks; what is free on a machine is divided by its number of processes.
        device: The model's device.

    Raises:
        ConfigError: An unknown choice, or a place with less free space than the batches take.
    """
    check_choice(choice)
    if choice == "none" or n_bytes == 0:
        return "none"
    if choice == "auto":
        is_small = n_bytes <= SMALL_BYTES
        return "host" if is_small or n_bytes <= AUTO_SHARE * basis_memory.free_bytes("cpu", device) else "none"
    place = "host" if choice == "device" and device.type == "cpu" else choice
    free = basis_memory.free_bytes("cpu" if place == "host" else place, device)
    if n_bytes > free:
        others = "probe.cache=disk or none" if place != "disk" else "probe.cache=none, or TMPDIR on a larger disk"
        reason = f"the images take {size_text(n_bytes)} and {size_text(int(free))} are free there"
        raise ConfigError("probe.cache", choice, reason, f"set {others}, or fewer images (probe.n_images)")
    return place


def new_store(place: str, n_bytes: int, device: torch.device) -> BatchStore | None:
    """Return an empty store at a place that `choose_place` returned; None for ``none``.

    Raises:
        StorageError: The disk has no space.
    """
    if place == "disk":
        return DiskStore(n_bytes, device)
    if place == "none":
        return None
    return MemoryStore(torch.device("cpu") if place == "host" else device, device)
