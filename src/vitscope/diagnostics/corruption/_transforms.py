"""The corruptions themselves: functions of one image, deterministic in its random generator.

Images are ``(h, w, channels)`` float64 in [0, 1]. Lengths are in pixels of the table's own image size; ``scale`` brings
them to another size. The random draws of an image do not depend on the severity, so that a step up only makes the
same corruption stronger. The maintained library (imagecorruptions) is not used: it knows the strengths for 224 pixels only,
cannot be seeded throughout, and brings OpenCV and numba. At 224 pixels the damage agrees with its within a few percent
for the types whose table and textures are the published ones.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from vitscope.diagnostics.corruption import _weather
from vitscope.diagnostics.corruption._kernels import convolved, disk, streak, zoom_matrix
from vitscope.diagnostics.corruption._tables import COMMON, LARGE, SEVERITIES, SMALL, SMALL_BELOW, VALIDATION

Array = np.ndarray


def corrupted(image: Array, name: str, severity: int, rng: Generator) -> Array:
    """Return ``image (h, w, channels)`` in [0, 1] corrupted, rounded to 8 bits as the published data sets are.

    Args:
        image: one or three channels.
        name: one of the fifteen common or four validation types.
        severity: 1 to 5.
        rng: the image's own generator; the same one gives the same draws at every severity.

    Raises:
        ValueError: an unknown type or severity.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"Expected a corruption among {', '.join(COMMON + VALIDATION)}, received {name!r}.")
    if severity not in SEVERITIES:
        raise ValueError(f"Expected severities from 1 to 5, received {severity!r}.")
    side = min(image.shape[:2])
    table, reference = (SMALL, 32) if side < SMALL_BELOW else (LARGE, 224)
    strength = table[name][severity - 1]
    result = FUNCTIONS[name](image.astype(np.float64), rng, side / reference, *strength)
    return np.round(255 * np.clip(result, 0, 1)) / 255


def gaussian_noise(x: Array, rng: Generator, scale: float, deviation: float) -> Array:
    """Add normal noise."""
    return x + deviation * rng.standard_normal(x.shape)


def shot_noise(x: Array, rng: Generator, scale: float, photons: float) -> Array:
    """Count photons: Poisson with mean ``photons * x``."""
    return rng.poisson(photons * x) / photons


def impulse_noise(x: Array, rng: Generator, scale: float, share: float) -> Array:
    """Set a share of the values to 0 or 1."""
    hit, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, salt, x)


def speckle_noise(x: Array, rng: Generator, scale: float, deviation: float) -> Array:
    """Add normal noise in proportion to the value."""
    return x + deviation * x * rng.standard_normal(x.shape)


def gaussian_blur(x: Array, rng: Generator, scale: float, deviation: float) -> Array:
    """Blur with a Gaussian."""
    return _blurred(x, deviation * scale)


def defocus_blur(x: Array, rng: Generator, scale: float, radius: float, smoothing: float) -> Array:
    """Blur with a disk, the shape of an aperture."""
    return convolved(x, disk(radius * scale, smoothing), "reflect")


def glass_blur(
    x: Array, rng: Generator, scale: float, deviation: float, reach: float, rounds: float, share: float
) -> Array:
    """Take a share of the pixels from somewhere near them, between two blurs."""
    x = _blurred(x, deviation * scale)
    h, w = x.shape[:2]
    rows, columns = np.mgrid[:h, :w]
    for _ in range(int(rounds)):
        # whole steps from -reach to reach, each as likely; a reach of .3 moves few pixels, and by one
        down, right = (np.rint((reach * scale + 0.5) * rng.uniform(-1, 1, (h, w))).astype(int) for _ in range(2))
        moved = rng.random((h, w)) < share
        x = x[np.clip(rows + down * moved, 0, h - 1), np.clip(columns + right * moved, 0, w - 1)]
    return _blurred(x, deviation * scale)


def motion_blur(x: Array, rng: Generator, scale: float, radius: float, deviation: float) -> Array:
    """Blur along a line within 45 degrees of the horizontal."""
    return convolved(x, streak(radius * scale, deviation * scale, rng.uniform(-45, 45)), "edge")


def zoom_blur(x: Array, rng: Generator, scale: float, largest: float, step: float) -> Array:
    """Average over zooms into the centre, the image itself twice among them."""
    factors = 1 + step * np.arange(round(largest / step) + 1)
    h, w = x.shape[:2]
    total = x.copy()
    for factor in factors:
        rows, columns = zoom_matrix(h, factor), zoom_matrix(w, factor)
        total += np.einsum("ij,jkc,lk->ilc", rows, x, columns, optimize=True)
    return total / (len(factors) + 1)


def brightness(x: Array, rng: Generator, scale: float, amount: float) -> Array:
    """Add to the value of hue, saturation, value, which scales the colour; black becomes gray."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def saturate(x: Array, rng: Generator, scale: float, factor: float, amount: float) -> Array:
    """Change the saturation of hue, saturation, value; gray has no hue and stays gray."""
    value = x.max(axis=2, keepdims=True)
    span = value - x.min(axis=2, keepdims=True)
    saturation = span / np.maximum(value, 1e-12)
    wanted = np.clip(factor * saturation + amount, 0, 1)
    return np.where(span > 0, value - (value - x) * wanted / np.maximum(saturation, 1e-12), x)


def contrast(x: Array, rng: Generator, scale: float, factor: float) -> Array:
    """Shrink the distance from each channel's mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (x - mean)


def elastic_transform(
    x: Array, rng: Generator, scale: float, jitter: float, displacement: float, smoothness: float
) -> Array:
    """Move three corners at random, then every pixel by a smooth random field."""
    h, w = x.shape[:2]
    side = min(h, w)
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]) * side / 3
    moved = corners + side * jitter * rng.uniform(-1, 1, (3, 2))
    basis = np.column_stack([corners, np.ones(3)])
    affine = np.linalg.solve(basis, moved)  # (3, 2): [row, column, 1] @ affine is where a pixel is read
    centre = (np.array([h, w]) - 1) / 2
    grid = np.moveaxis(np.mgrid[:h, :w], 0, -1) - centre  # (h, w, 2)
    field = rng.uniform(-1, 1, (h, w, 2))
    field = gaussian_filter(field, (side * smoothness, side * smoothness, 0), mode="reflect")
    field *= side * displacement / max(np.sqrt(np.mean(field**2)), 1e-12)
    place = np.moveaxis(grid @ affine[:2] + affine[2] + centre + field, -1, 0)
    return np.stack([map_coordinates(x[..., c], place, order=1, mode="mirror") for c in range(x.shape[2])], axis=-1)


def pixelate(x: Array, rng: Generator, scale: float, factor: float) -> Array:
    """Shrink and enlarge with boxes."""
    h, w = x.shape[:2]
    image = _to_pil(x).resize((max(1, int(w * factor)), max(1, int(h * factor))), Image.Resampling.BOX)
    return _from_pil(image.resize((w, h), Image.Resampling.BOX))


def jpeg_compression(x: Array, rng: Generator, scale: float, quality: float) -> Array:
    """Compress."""
    buffer = BytesIO()
    _to_pil(x).save(buffer, "JPEG", quality=int(quality))
    return _from_pil(Image.open(buffer))


def _blurred(x: Array, deviation: float) -> Array:
    return gaussian_filter(x, (deviation, deviation, 0), mode="nearest")


def _to_pil(x: Array) -> Image.Image:
    pixels = np.round(255 * x).astype(np.uint8)
    return Image.fromarray(pixels if x.shape[2] == 3 else pixels[..., 0])


def _from_pil(image: Image.Image) -> Array:
    pixels = np.asarray(image, dtype=np.float64) / 255
    return pixels if pixels.ndim == 3 else pixels[..., None]


FUNCTIONS = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, _weather.snow,
        _weather.frost, _weather.fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression, speckle_noise,
        gaussian_blur, _weather.spatter, saturate,
    )
}  # fmt: skip
