"""Corruptions that need a texture: snow, frost, fog and spatter."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter, zoom

from vitscope.diagnostics.corruption._kernels import convolved, streak

Array = np.ndarray


def fog(x: Array, rng: Generator, scale: float, amount: float, fading: float) -> Array:
    """Add clouds and rescale, so that the brightest pixel keeps its value."""
    brightest = x.max()
    clouded = x + amount * clouds(x.shape[:2], rng, fading)[..., None]  # clouds (h, w) to (h, w, 1)
    return clouded * brightest / (brightest + amount)


def frost(x: Array, rng: Generator, scale: float, image_weight: float, share: float) -> Array:
    """Lay ice crystals over the image.

    The published data sets take them from photographs; these are made, bright ridges on a bluish gray.
    """
    ridges = np.zeros(x.shape[:2])
    for k in range(3):
        ridges += 0.5**k * (1 - np.abs(2 * clouds(x.shape[:2], rng, 1.6) - 1)) ** 3 / 1.75
    tint = np.array([0.78, 0.88, 1.0]) if x.shape[2] == 3 else np.ones(1)
    return image_weight * x + share * (0.25 + 0.75 * ridges[..., None]) * tint  # (h, w, C) + (h, w, 1) * (C,)


def snow(
    x: Array, rng: Generator, scale: float,
    mean: float, deviation: float, size: float, threshold: float, radius: float, blur: float, image_weight: float,
) -> Array:  # fmt: skip
    """Whiten the image and let flakes fall on it, in two opposite directions."""
    h, w = x.shape[:2]
    flakes = mean + deviation * rng.standard_normal((h, w))
    flakes = _enlarged(flakes, size)  # flakes of the published size in pixels, whatever the image's
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    angle = rng.uniform(-135, -45)
    fallen = convolved(flakes[..., None], streak(radius * scale, blur * scale, angle), "edge")
    gray = x @ np.array([0.299, 0.587, 0.114])[:, None] if x.shape[2] == 3 else x  # luminance, (h, w, 1)
    whitened = image_weight * x + (1 - image_weight) * np.maximum(x, 1.5 * gray + 0.5)
    return whitened + fallen + np.rot90(fallen, 2)


def spatter(x: Array, rng: Generator, scale: float, size: float, covered: float, opacity: float) -> Array:
    """Cover a share of the image with drops of mud."""
    drops = gaussian_filter(rng.standard_normal(x.shape[:2]), size * scale, mode="wrap")
    edge = np.quantile(drops, 1 - covered)
    spread = max(float(drops.std()), 1e-12)  # 0 where all of the image is one drop
    mask = opacity * np.clip((drops - edge) / (0.3 * spread) + 0.5, 0, 1)[..., None]  # (h, w) to (h, w, 1)
    mud = np.array([63, 42, 20]) / 255 if x.shape[2] == 3 else np.full(1, 42 / 255)
    return (1 - mask) * x + mask * mud


def clouds(shape: tuple[int, ...], rng: Generator, fading: float) -> Array:
    """Return a random landscape in [0, 1]: octaves of smooth noise, each finer one weaker by ``fading``."""
    side = max(shape)
    total = np.zeros(shape)
    for octave in range(1, int(np.ceil(np.log2(max(side, 2)))) + 1):
        n = 2**octave + 1
        grid = rng.uniform(-1, 1, (n, n))
        total += fading**-octave * _stretched(grid, side)[: shape[0], : shape[1]]
    total -= total.min()
    return np.asarray(total / max(total.max(), 1e-12))


def _stretched(grid: Array, side: int) -> Array:
    """Interpolate ``grid (n, n)`` linearly onto ``(side, side)``."""
    place = np.linspace(0, len(grid) - 1, side)
    low = np.minimum(place.astype(int), len(grid) - 2)
    part = place - low
    rows = grid[low] * (1 - part[:, None]) + grid[low + 1] * part[:, None]  # (side, n)
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _enlarged(layer: Array, factor: float) -> Array:
    """Zoom into the center of ``layer (h, w)`` at unchanged size."""
    h, w = layer.shape
    rows, columns = int(np.ceil(h / factor)), int(np.ceil(w / factor))
    first_row, first_column = (h - rows) // 2, (w - columns) // 2
    larger = np.asarray(
        zoom(
            layer[first_row : first_row + rows, first_column : first_column + columns], (h / rows, w / columns), order=1
        )
    )
    return larger[:h, :w]
