"""Walking through a plane or along a line of weight space in place, without a second model.

Beside the model itself two sets of tensors of the weights' size take memory on its device: the row of the plane that is
being walked, and the second direction. The weights to go back to and the first direction are set aside: in host memory for
an accelerator, in an unlinked temporary file (mapped, so that the system may drop its pages) for the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Move = Callable[[float, float], None]

#: entries that are held in float64 at once
_PIECE = 2**18


def set_aside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that take none of the device's memory (see the module); on a full disk, copies in memory."""
    tensors = {name: t.detach() for name, t in tensors.items()}
    if any(t.device.type != "cpu" for t in tensors.values()):
        return {name: t.to("cpu", copy=True) for name, t in tensors.items()}
    try:
        return _mapped(tensors)
    except OSError:
        return {name: t.clone() for name, t in tensors.items()}


def _mapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with tempfile.TemporaryFile(prefix="vitscope-") as file:
        for t in tensors.values():
            t.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        file.flush()
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        if total == 0:
            return {name: t.clone() for name, t in tensors.items()}
        # copy-on-write: a writable array (torch warns of others) that never reaches the file
        content = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c", shape=(total,)))
    mapped_tensors, start = {}, 0
    for name, t in tensors.items():
        piece = content[start : start + t.numel() * t.element_size()]
        start += piece.numel()
        # a type wider than its offset is a multiple of cannot be a view
        aligned = piece if piece.storage_offset() % t.element_size() == 0 else piece.clone()
        mapped_tensors[name] = aligned.view(t.dtype).reshape(t.shape)  # bytes (n,) to t's type and shape
    return mapped_tensors


@contextmanager
def points_in_plane(
    parameters: Mapping[str, Tensor], first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor]
) -> Iterator[Move]:
    """Yield ``move(a, b)``, which sets the parameters to ``w + a * first + b * second`` in place.

    ``w`` are the weights on entry; on exit, also after an exception, they are back bit for bit. Every point is computed from
    ``w`` afresh, so its weights do not depend on the points visited before. Moves that keep ``a`` cost one pass over the weights.

    Args:
        parameters: The parameters by name; those in neither direction are not touched.
        first: The first direction, None for a line (a is then not used); pass it `set_aside` to save memory.
        second: The second direction, or the line's.
    """
    names = [name for name in parameters if name in second or (first is not None and name in first)]
    weights = [parameters[name].detach() for name in names]
    row = [torch.empty_like(w).copy_(w) for w in weights]
    start = row if first is None else list(set_aside(dict(zip(names, weights))).values())
    position = 0.0

    def move(a: float, b: float) -> None:
        nonlocal position
        if first is not None and a != position:
            for name, r, w in zip(names, row, start):
                r.copy_(w)
                if name in first:
                    r.add_(first[name].to(r.device), alpha=a)
            position = a
        for name, p, r in zip(names, weights, row):
            if name in second:
                torch.add(r, second[name], alpha=b, out=p)
            else:
                p.copy_(r)

    try:
        with torch.no_grad():
            yield move
    finally:
        with torch.no_grad():
            for p, w in zip(weights, start):
                p.copy_(w)


@contextmanager
def points_on_segment(
    tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> Iterator[Callable[[float], None]]:
    """Yield ``move(t)``, which sets the tensors to ``(1 - t) * start + t * end`` in place, exactly so at both ends.

    On exit, also after an exception, they are back bit for bit. Tensors of integers (counters) take the nearer end's values.

    Args:
        tensors: Parameters and buffers by name.
        start: Values at t = 0, of every name in ``tensors``.
        end: Values at t = 1.
    """
    original_tensors = {name: t.detach().clone() for name, t in tensors.items()}
    ends = {
        name: tuple(_apart(state[name], tensors[name], t) for state in (start, end))
        for name, t in original_tensors.items()
    }

    def move(t: float) -> None:
        for name, tensor in tensors.items():
            a, b = ends[name]
            is_whole = not a.is_floating_point() and not a.is_complex()
            if t in (0.0, 1.0) or is_whole:  # lerp would carry one end's NaN to the other
                tensor.copy_(a if t < 0.5 else b)
            elif a.layout != torch.strided:
                tensor.copy_((1 - t) * a + t * b)
            else:
                tensor.copy_(torch.lerp(a, b, t))

    try:
        with torch.no_grad():
            yield move
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(original_tensors[name])


def _apart(end_value: Tensor, moving: Tensor, original: Tensor) -> Tensor:
    """Return ``end_value`` on the device and in the type of ``original``, which stands in for it where it is what moves."""
    if end_value.layout != torch.strided:  # whose parts may be another tensor's too
        return end_value.detach().to(original).clone()
    if (
        end_value.device == moving.device
        and end_value.data_ptr() == moving.data_ptr()
        and end_value.dtype == moving.dtype
    ):
        return original  # a live state dict: its values would move too
    return end_value.detach().to(original)


@dataclass(frozen=True)
class SquaredNorms:
    """The squared norm of each parameter tensor as a quadratic function of the plane's coordinates, exact in float64.

    Attributes:
        products: (n_tensors, 6) inner products ww, wu, wv, uu, uv, vv of weights w and directions u, v.
    """

    products: np.ndarray

    def at(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the squared norms at coordinates of any common shape: (n_tensors, *shape)."""
        a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
        terms = np.stack([np.ones_like(a), 2 * a, 2 * b, a * a, 2 * a * b, b * b])  # (6, *shape)
        return np.maximum(np.tensordot(self.products, terms, axes=1), 0.0)

    def half_sq(self, weight_decay: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return wd/2 * the sum of squares over all tensors."""
        return 0.5 * weight_decay * self.at(a, b).sum(axis=0)

    def sum_norm(self, weight_decay: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return wd * the sum of the tensors' norms."""
        return weight_decay * np.sqrt(self.at(a, b)).sum(axis=0)


def squared_norms(
    parameters: Mapping[str, Tensor], first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor]
) -> SquaredNorms:
    """Return the squared norms over the plane ``w + a * first + b * second`` (a line where first is None).

    Args:
        parameters: All parameters that the L2 term counts, by name, those that stay included.
        first: The first direction.
        second: The second direction.
    """

    pairs = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    norms = []
    for name, w in parameters.items():
        gram = _gram(w, (first or {}).get(name), second.get(name))
        norms.append([float(gram[pair]) for pair in pairs])
    return SquaredNorms(np.array(norms))


def _gram(*vectors: Tensor | None) -> Tensor:
    """Return the inner products of tensors of one size in float64, zero for those that are None; on the host."""
    like = next(t for t in vectors if t is not None)
    flat = [None if t is None else t.detach().to(like.device).reshape(-1) for t in vectors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=like.device)
    for start in range(0, like.numel(), _PIECE):
        piece = torch.zeros(len(flat), min(_PIECE, like.numel() - start), dtype=torch.float64, device=like.device)
        for row, t in zip(piece, flat):
            if t is not None:
                row.copy_(t[start : start + _PIECE])
        total += piece @ piece.T
    return total.cpu()
