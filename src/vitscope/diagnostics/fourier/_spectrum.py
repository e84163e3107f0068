"""Amplitudes of a feature map's discrete Fourier transform, along the half diagonal or in rings.

``F(k, l) = sum over m, n of x[m, n] exp(-2 pi i (k m / h + l n / w))``. Frequencies are in units of pi radians a
pixel, so that 1 is the Nyquist frequency and bin k of n lies at 2k/n.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SpectrumPath = Literal["diagonal", "radial"]
PATHS: tuple[str, ...] = get_args(SpectrumPath)

#: added to amplitudes before the logarithm, as in the official notebook
EPS = 1e-6

#: below this share of the constant part's power a map is looked at value by value, whether it varies at all
_FAINT = 1e-8

#: maps up to this side take one matrix product; larger ones are folded first
_FOLD_ABOVE = 14

#: floats that are folded at once on a CPU, so that the copy stays in its cache
_CHUNK = 1 << 18


class Spectrum(NamedTuple):
    """One batch's spectrum, averaged over channels.

    Attributes:
        log_amplitude: (B, n_bins) mean over channels (and the bins of a ring) of log(|F| + eps), natural logarithm.
        power: (B, n_bins) mean over channels of |F|^2, summed over the bins of a ring.
    """

    log_amplitude: Tensor
    power: Tensor


def frequencies(size: tuple[int, int], path: str = "diagonal") -> np.ndarray:
    """Return the true frequency of each bin ``(n_bins,)`` in units of pi, the constant part first.

    Along the diagonal the last bin is 1 - 2/h for even and 1 - 1/h for odd h; a ring has its bins' mean radius.

    Raises:
        ValueError: A diagonal of a map that is not square, or an unknown path.
    """
    _check(size, path)
    h, w = size
    if path == "diagonal":
        return 2.0 * np.arange((h + 1) // 2) / h
    ring, radius, weight = _rings(h, w)
    inside = ring >= 0
    weights = np.bincount(ring[inside], weight[inside])
    return np.bincount(ring[inside], (weight * radius)[inside]) / weights


def spectrum(x: Tensor, path: str = "diagonal", eps: float = EPS) -> Spectrum:
    """Return the spectrum of feature maps ``x (B, C, h, w)``, averaged over channels.

    The diagonal holds |F(k, k)| for k = 0 ... ceil(h/2) - 1; ``radial`` averages over rings one bin of the
    shorter side wide of the whole transform, up to the Nyquist frequency (the corners are left out). Ring 0 is the constant part.

    Raises:
        ValueError: A diagonal of a map that is not square, or an unknown path.
    """
    h, w = x.shape[-2:]
    _check((h, w), path)
    x = x if x.dtype == torch.float64 else x.float()
    if path == "diagonal":
        power = diagonal(x)  # (B, C, n_bins)
        return Spectrum((power.sqrt() + eps).log().mean(1).double(), power.mean(1).double())
    average, total = _ring_matrices(h, w, x.dtype, x.device)
    power = torch.view_as_real(torch.fft.rfft2(x)).square().sum(-1).flatten(2)  # (B, C, h * (w // 2 + 1))
    return Spectrum(((power.sqrt() + eps).log().mean(1) @ average).double(), (power.mean(1) @ total).double())


def varies(x: Tensor, power: Tensor) -> bool:
    """Return whether any map ``x (B, C, h, w)`` of that power ``(B, n_bins)`` is not constant over its positions."""
    clearly = (power[:, 1:].sum(1) > _FAINT * power[:, 0]).any()
    return bool(clearly) or bool((x.amax((-2, -1)) > x.amin((-2, -1))).any())


def diagonal(x: Tensor) -> Tensor:
    """Return |F(k, k)|^2 ``(B, C, ceil(h/2))`` of square maps ``x (B, C, h, h)`` without a Fourier transform.

    On the diagonal the phase depends on (m + n) mod h alone. Small maps, and maps that keep their channels last in
    memory, take one matrix product. Of others the wrapped anti-diagonals are added up first: behind every row of h a
    zero is put, and the h (h + 1) numbers are then read again as h + 1 rows of h, whose columns are these sums.
    """
    h = x.shape[-1]
    if x.stride(-1) != 1:  # channels last: (2 n_bins, h h) @ (B, h h, C)
        parts = (_phases(h, True, x.dtype, x.device).T @ x.flatten(2).transpose(1, 2)).transpose(1, 2)
    elif h <= _FOLD_ABOVE:
        parts = x.flatten(2) @ _phases(h, True, x.dtype, x.device)
    else:
        parts = _folded(x) @ _phases(h, False, x.dtype, x.device)
    return parts.unflatten(-1, (2, -1)).square().sum(-2)  # real and imaginary parts: (B, C, 2, n_bins)


def _folded(x: Tensor) -> Tensor:
    """Return the sums over m + n = j (mod h), ``(B, C, h)``."""
    b, c, h, _ = x.shape
    maps = x.reshape(b * c, h, h)  # (B * C, h, h)
    sums = x.new_empty(b * c, h)
    step = len(maps) if x.is_cuda else max(1, _CHUNK // (h * h))
    for start in range(0, len(maps), step):
        padded = F.pad(maps[start : start + step], (0, 1))  # (n, h, h + 1)
        # rows of h + 1 entries read as h + 1 rows of h: entry n of row m moves to column m + n (mod h)
        torch.sum(padded.view(-1, h + 1, h), dim=1, out=sums[start : start + step])
    return sums.view(b, c, h)


@lru_cache(maxsize=32)
def _phases(h: int, whole: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cosines and sines, ``(h h or h, 2 n_bins)``: of a whole map, or of its anti-diagonal sums."""
    place = torch.arange(h, device=device)
    if whole:
        place = (place[:, None] + place).flatten()
    # reduced modulo h in integers, so that the phases are exact at any size
    angle = (place[:, None] * torch.arange((h + 1) // 2, device=device) % h).double() * (2 * torch.pi / h)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)


@lru_cache(maxsize=32)
def _rings(h: int, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each bin's ring (-1 outside), radius and multiplicity in the half plane of ``rfft2``, flattened."""
    radius = np.hypot(2 * np.abs(np.fft.fftfreq(h))[:, None], 2 * np.fft.rfftfreq(w))
    finest = min(h, w)
    ring = np.round(radius * finest / 2).astype(int)
    # on maps twice as long as wide the lowest frequencies lie within half a ring of 0: ring 0 is the constant part alone
    ring[(ring == 0) & (radius > 0)] = 1
    ring[ring > finest // 2] = -1
    columns = np.arange(w // 2 + 1)
    twice = (columns > 0) & (2 * columns != w)  # the mirror image of these columns is not stored
    weight = np.broadcast_to(1.0 + twice, radius.shape)
    return ring.ravel(), radius.ravel(), weight.ravel()


@lru_cache(maxsize=32)
def _ring_matrices(h: int, w: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    ring, _, weight = _rings(h, w)
    total = np.zeros((len(ring), ring.max() + 1))
    inside = np.flatnonzero(ring >= 0)
    total[inside, ring[inside]] = weight[inside]
    average = total / total.sum(0)
    return torch.from_numpy(average).to(device, dtype), torch.from_numpy(total).to(device, dtype)


def _check(size: tuple[int, int], path: str) -> None:
    if path not in PATHS:
        raise ValueError(f"Expected the spectrum's path to be one of {', '.join(PATHS)}, received {path!r}.")
    if path == "diagonal" and size[0] != size[1]:
        raise ValueError(f"Expected square maps on the diagonal, received {size[0]}x{size[1]}: use path='radial'.")
