"""Square frequency bands: which bins belong to which, noise inside one, and images without one side of a cut-off.

The frequency of a bin is ``rho = max(|k| / (h/2), |l| / (w/2))`` in units of pi, so that 1 is the Nyquist frequency. Masks
are given for the half plane that ``torch.fft.rfft2`` stores: real images stay real, at any size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rings(h: int, w: int, n_bands: int) -> np.ndarray:
    """Return the band of each bin, ``(h, w // 2 + 1)``: j for rho in (j/n, (j+1)/n], -1 for the constant part.

    Each bin but the constant is in exactly one band; the edges are compared in integers.
    """
    rows = np.abs(_signed(h))[:, None]
    columns = np.arange(w // 2 + 1)
    # ceil(rho n) - 1 with rho = 2 |k| / h
    return np.maximum(-(-2 * n_bands * rows // h), -(-2 * n_bands * columns // w)) - 1


def frequency(h: int, w: int) -> np.ndarray:
    """Return rho of each bin, ``(h, w // 2 + 1)``."""
    return np.maximum(2 * np.abs(_signed(h))[:, None] / h, 2 * np.arange(w // 2 + 1) / w)


def multiplicity(h: int, w: int) -> np.ndarray:
    """Return how often each stored bin stands in the whole plane, ``(h, w // 2 + 1)``: once or twice."""
    columns = np.arange(w // 2 + 1)
    return np.broadcast_to(1 + ((columns > 0) & (2 * columns != w)), (h, w // 2 + 1))


def filtered(x: Tensor, keep: np.ndarray) -> Tensor:
    """Return ``x (..., h, w)`` with only the bins in ``keep (h, w // 2 + 1)``, of x's type, filtered in float32 at least."""
    wide = widened(x)
    mask = torch.from_numpy(keep).to(wide)
    return torch.fft.irfft2(torch.fft.rfft2(wide) * mask, s=tuple(x.shape[-2:])).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower: there is no transform of bfloat16, and none of float16 on a CPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def white_noise(shape: tuple[int, ...], seed: int, batch: int) -> Tensor:
    """Return standard normal noise (float64), a function of (shape, seed, batch) alone, on any machine and rank."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, batch]).generate_state(1)[0]))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def band_noise(white: Tensor, keep: np.ndarray) -> Tensor:
    """Return the part of white noise ``(B, C, h, w)`` in a band, scaled to rms 1 over each image's channels and pixels."""
    noise = filtered(white, keep)
    return noise / noise.square().mean((1, 2, 3), keepdim=True).sqrt()


def official_mask(h: int, w: int, center: float, half_width: float) -> np.ndarray:
    """Return the official code's square ring in the centered plane, ``(h, w)`` booleans.

    Its sides are ``2 int((f +- s) h / 2 pi)`` with f and s in radians, here in units of pi. A side of 2m covers the bins
    from -m to m - 1, so that the ring is off by half a bin, is not symmetric, and the lowest one holds the constant part.
    """

    def square(edge: float) -> np.ndarray:
        rows, columns = (int(max(edge, 0.0) * n / 2 + 1e-9) for n in (h, w))
        inside = np.zeros((h, w), dtype=bool)
        inside[h // 2 - rows : h // 2 + rows, w // 2 - columns : w // 2 + columns] = True
        return inside

    return square(center + half_width) & ~square(center - half_width)


def official_noise(white: Tensor, mask: np.ndarray) -> Tensor:
    """Return the real part of the signs of white noise ``(B, C, h, w)`` under a centered mask; its rms is left as it is."""
    where = torch.from_numpy(np.fft.ifftshift(mask)).to(white.device)
    return torch.fft.ifft2(torch.fft.fft2(white.sign()) * where).real


def official_rms(mask: np.ndarray) -> float:
    """Return the expected rms of `official_noise`: bins whose mirror image is not in the mask lose half their power."""
    inside = np.fft.ifftshift(mask)
    mirrored = np.roll(inside[::-1, ::-1], (1, 1), axis=(0, 1))
    return float(np.sqrt((inside & mirrored).mean() + 0.5 * (inside & ~mirrored).mean()))


def _signed(n: int) -> np.ndarray:
    return np.round(np.fft.fftfreq(n) * n).astype(int)
