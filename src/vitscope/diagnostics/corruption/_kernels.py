"""Blur kernels, and how an image is convolved with one."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve


def convolved(x: np.ndarray, kernel: np.ndarray, mode: Literal["reflect", "edge"]) -> np.ndarray:
    """Return ``x (h, w, channels)`` convolved with an odd-sided kernel at unchanged size, beyond its border as ``mode``."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((rows, rows), (columns, columns), (0, 0)), mode=mode)
    return fftconvolve(padded, kernel[:, :, None], mode="valid", axes=(0, 1))


@lru_cache(maxsize=16)
def disk(radius: float, smoothing: float) -> np.ndarray:
    """Return a disk of that radius with its edge smoothed over one pixel (two for a large disk); sums to 1."""
    reach = int(np.ceil(radius)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = (x**2 + y**2 <= radius**2).astype(np.float64)
    return gaussian_filter(inside / inside.sum(), smoothing, radius=1 if radius <= 8 else 2, mode="constant")


def streak(radius: float, deviation: float, degrees: float) -> np.ndarray:
    """Return half a Gaussian along a line from the center, as a moving camera leaves it; sums to 1.

    Args:
        radius: The line is ``2 * radius + 1`` pixels long.
        deviation: Standard deviation of the Gaussian, in pixels.
        degrees: Angle of the line, 0 to the right, counted downwards.
    """
    along = np.arange(round(2 * radius) + 1)
    weight = np.exp(-0.5 * (along / max(deviation, 1e-6)) ** 2)
    along, weight = along[weight > 1e-4], weight[weight > 1e-4]
    place = np.stack([along * np.sin(np.deg2rad(degrees)), along * np.cos(np.deg2rad(degrees))])
    reach = len(along)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    low = np.floor(place).astype(int)
    part = place - low
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # bilinear shares of the four pixels around each point
        share = np.abs(1 - down - part[0]) * np.abs(1 - right - part[1])
        np.add.at(kernel, (low[0] + down + reach, low[1] + right + reach), weight * share)
    return kernel / kernel.sum()


@lru_cache(maxsize=256)
def zoom_matrix(n: int, factor: float) -> np.ndarray:
    """Return the matrix ``(n, n)`` that enlarges the middle of a line of n pixels.

    As the released code does: the ``ceil(n / factor)`` pixels in the middle are stretched linearly, first on first and last on
    last, over ``round(n' * factor)`` pixels, of which the middle n are kept. Whole pixels, so a small zoom of a small image is
    none, or shifts it.
    """
    part = int(np.ceil(n / factor))
    first = (n - part) // 2
    larger = max(n, round(part * factor))
    place = first + (np.arange(n) + (larger - n) // 2) * (part - 1) / max(larger - 1, 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(n)))
