"""Fingerprints of tensors: tell whether a tensor, or a pass over batches, holds the same bits as before."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import BatchInputs, tensors_of
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning

Fingerprint = tuple[tuple[int, ...], str, int]

_PIECE = 2**20
_FACTOR = 6364136223846793005  # Knuth's multiplier: pieces of a tensor do not commute
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return shape, type and a 64-bit sum over the tensor's bits that depends on their order.

    The sum is of integers, so it is the same on every device; two different tensors share it with a probability of 2**-64.
    Made on the tensor's own device, in pieces.
    """
    if tensor.layout != torch.strided:
        parts = [fingerprint(part) for part in dense_parts(tensor)]
        return tuple(tensor.shape), str(tensor.dtype), hash(tuple(parts))
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    flat = real.int_repr().reshape(-1) if real.is_quantized else real.contiguous().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in bits.split(_PIECE):
        weights = _weights(str(piece.device))[: len(piece)]
        total = total * _FACTOR + (piece.long() * weights).sum()
    return tuple(tensor.shape), str(tensor.dtype), int(total)


@cache
def _weights(device: str) -> Tensor:
    """Return odd random integers, which keep every bit of what they multiply."""
    generator = torch.Generator().manual_seed(0)
    low, high = -(2**62), 2**62
    return (torch.randint(low, high, (_PIECE,), generator=generator) * 2 + 1).to(device)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a sparse one is made of; the tensor itself where it is dense.

    Raises:
        ValueError: A layout that has none (opaque ones, such as MKL-DNN's).
    """
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    raise ValueError(f"Expected a dense or sparse tensor, received one of layout {tensor.layout}.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one layout are equal in shape, type and values; NaN is equal to nothing."""
    if a.layout != b.layout or a.shape != b.shape or a.dtype != b.dtype:
        return False
    try:
        return all(
            x.shape == y.shape and (x.is_meta or torch.equal(x, y)) for x, y in zip(dense_parts(a), dense_parts(b))
        )
    except ValueError:  # an opaque layout
        return False


class SeenBatches:
    """The fingerprints of batches on their first pass; every later pass is held against them."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[Fingerprint | None, ...]] = {}
        self._tensors: dict[int, list[tuple[weakref.ref[Tensor], int]]] = {}
        self._length: int | None = None
        # the first batch of each set of inputs and targets
        self._places: dict[tuple[Fingerprint | None, ...], int] = {}
        self._has_warned = False

    def checked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            ValueError: A batch that differs from the one at its place on an earlier pass, or a pass of another length.
        """
        count = 0
        for count, batch in enumerate(batches, start=1):
            self._check(count - 1, batch)
            yield batch
        if self._length is not None and count != self._length:
            raise ValueError(
                f"Expected the same batches on every pass, received {count} after a pass of {self._length}: {_FIX}"
            )
        self._length = count

    def checked_share(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Yield the number of a batch and the batch for some of all batches.

        Raises:
            ValueError: A batch that differs from the one of its number on an earlier pass.
        """
        for index, batch in batches:
            self._check(index, batch)
            yield index, batch

    def _check(self, index: int, batch: Any) -> None:
        tensors = [t for part in batch for t in tensors_of(part)] if isinstance(batch, tuple | list) else []
        earlier_tensors = self._tensors.get(index, [])
        # the very tensors of an earlier pass, not written to since, need no second look
        if (
            earlier_tensors
            and len(earlier_tensors) == len(tensors)
            and all(r() is t and v == version(t) for (r, v), t in zip(earlier_tensors, tensors))
        ):
            return
        fingerprints = tuple(None if t.is_meta else fingerprint(t) for t in tensors)
        first = self._first.setdefault(index, fingerprints)
        self._warn_of_copies(index, first)
        if fingerprints != first:
            names = [name for name, a, b in zip(_names(batch), fingerprints, first) if a != b]
            raise ValueError(
                f"Expected the same batches on every pass, received other {' and '.join(names) or 'tensors'} in batch "
                f"{index} than on the first pass: {_FIX}"
            )
        self._tensors[index] = [(weakref.ref(t), version(t)) for t in tensors]

    def _warn_of_copies(self, index: int, fingerprints: tuple[Fingerprint | None, ...]) -> None:
        place = self._places.setdefault(fingerprints, index)
        if place != index and fingerprints and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"batches {place} and {index} hold the same images and targets, bit for bit, as "
                "[next(iter(loader)) for _ in range(n)] makes them: they count as further images, and intervals are too narrow",
                UnlikelyInputWarning,
                stacklevel=5,
            )


def _names(batch: Any) -> list[str]:
    inputs = batch[0]
    if not isinstance(inputs, BatchInputs):
        return ["images", "targets"]
    entries = inputs.entries.items() if isinstance(inputs.entries, dict) else enumerate(inputs.entries)
    return [*(f"entry {key!r}" for key, value in entries if isinstance(value, Tensor)), "targets"]


def version(tensor: Tensor) -> int:
    """Return the number of writes in place to a tensor that autograd counted; -1 for inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


_FIX = "use shuffle=False and transforms without randomness, or list() one pass of the loader."
