"""The corruptions themselves: functions of one image, deterministic in its random generator.

Images are ``(h, w, channels)`` float64 in [0, 1]. Lengths are in pixels of the table's own image size; ``scale`` brings
them to another size. The random draws of an image do not depend on the severity, so that a step up only makes the
same corruption stronger. The maintained library (imagecorruptions) is not used: it knows the strengths for 224 pixels only,
cannot be seeded throughout, and brings OpenCV and numba. What differs from the released code: the crystals of frost and the
clouds of fog are drawn instead of cut out of photographs or a diamond-square map, motion is a sampled line, blurs take 64 bits.
"""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from vitscope.diagnostics.corruption import _weather
from vitscope.diagnostics.corruption._kernels import convolved, disk, streak, zoom_matrix
from vitscope.diagnostics.corruption._severity_table import COMMON, SEVERITIES, TABLES, VALIDATION, reference_side

Array = np.ndarray


def corrupted(image: Array, name: str, severity: int, rng: Generator) -> Array:
    """Return ``image (h, w, channels)`` in [0, 1] corrupted, rounded to 8 bits as the published data sets are.

    Args:
        image: One or three channels; rounded to 8 bits first, as the published code reads files.
        name: One of the fifteen common or four validation types.
        severity: 1 to 5.
        rng: The image's own generator; the same one gives the same draws at every severity.

    Raises:
        ValueError: An unknown type or severity, or an image that is empty, not finite or of other channels.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"Expected a corruption among {', '.join(COMMON + VALIDATION)}, received {name!r}.")
    if severity not in SEVERITIES:
        raise ValueError(f"Expected severities from 1 to 5, received {severity!r}.")
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        raise ValueError(f"Expected an image (height, width, 1 or 3 channels), received {image.shape}.")
    if not np.isfinite(image).all():
        raise ValueError("Expected an image of finite values, received NaN or infinity.")
    side = min(image.shape[:2])
    reference = reference_side(side)
    strength = TABLES[reference][name][severity - 1]
    pixels = np.round(255 * np.clip(image.astype(np.float64), 0, 1)) / 255  # else rounding of black pixels has a hue
    result = FUNCTIONS[name](pixels, rng, side / reference, *strength)
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


def glass_blur(x: Array, rng: Generator, scale: float, deviation: float, reach: float, rounds: float) -> Array:
    """Take the pixels, except at the border, from somewhere near them, between two blurs."""
    x = _blurred(x, deviation * scale)
    h, w = x.shape[:2]
    steps = max(1, round(reach * scale))
    draws = rng.uniform(-1, 1, (2, 3, h, w))  # of up to three rounds, alike at every severity
    for down, right in zip(*np.floor(steps * draws[:, : int(rounds)]).astype(int)):  # from -steps to steps - 1
        x = x.reshape(h * w, -1)[shuffled(down, right, steps)].reshape(x.shape)  # (h, w, C) by pixels (h * w, C)
    return _blurred(x, deviation * scale)


def shuffled(down: Array, right: Array, border: int) -> Array:
    """Return the pixel ``(h * w,)`` that each pixel shows after one round of the shuffle.

    The pixels within ``border < row <= h - border`` (columns likewise) are overwritten one after the other, from the last to the
    first, each by the pixel ``(down, right)`` of it as that is then: one that was overwritten before hands on what it shows.
    """
    h, w = down.shape
    rows, columns = np.mgrid[:h, :w]
    moved = (rows > border) & (rows <= h - border) & (columns > border) & (columns <= w - border)
    order = np.arange(h * w)
    target = np.where(
        moved, (rows + down).clip(0, h - 1) * w + (columns + right).clip(0, w - 1), rows * w + columns
    ).ravel()
    moved = moved.ravel()
    goes_on = moved & moved[target] & (target > order)
    while goes_on.any():  # each pass doubles the length of the chains that are resolved
        target, goes_on = np.where(goes_on, target[target], target), goes_on & goes_on[target]
    return target


def motion_blur(x: Array, rng: Generator, scale: float, radius: float, deviation: float) -> Array:
    """Blur along a line within 45 degrees of the horizontal."""
    return convolved(x, streak(radius * scale, deviation * scale, rng.uniform(-45, 45)), "edge")


def zoom_blur(x: Array, rng: Generator, scale: float, end: float, step: float) -> Array:
    """Average over zooms into the center, the image itself twice among them."""
    factors = np.arange(1, end, step)
    h, w = x.shape[:2]
    total = x.copy()
    for factor in factors:
        rows, columns = zoom_matrix(h, float(factor)), zoom_matrix(w, float(factor))
        total += np.einsum("ij,jkc,lk->ilc", rows, x, columns, optimize=True)  # (h, h) (h, w, C) (w, w) to (h, w, C)
    return total / (len(factors) + 1)


def brightness(x: Array, rng: Generator, scale: float, amount: float) -> Array:
    """Add to the value of hue, saturation, value, which scales the color; black becomes gray."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def saturate(x: Array, rng: Generator, scale: float, factor: float, amount: float) -> Array:
    """Change the saturation of hue, saturation, value; gray has no hue and stays gray."""
    value = x.max(axis=2, keepdims=True)
    span = value - x.min(axis=2, keepdims=True)
    saturation = span / np.maximum(value, 1e-12)
    new_saturation = np.clip(factor * saturation + amount, 0, 1)
    return np.where(span > 0, value - (value - x) * new_saturation / np.maximum(saturation, 1e-12), x)


def contrast(x: Array, rng: Generator, scale: float, factor: float) -> Array:
    """Shrink the distance from each channel's mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (x - mean)


def elastic_transform(
    x: Array, rng: Generator, scale: float, amplitude: float, smoothness: float, jitter: float
) -> Array:
    """Move three corners at random, then every pixel by a smooth random field."""
    h, w = x.shape[:2]
    side = max(1, min(h, w) // 3)
    corners = np.array([h // 2, w // 2]) + side * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + jitter * scale * rng.uniform(-1, 1, (3, 2))
    # a pixel is read at [row, column, 1] @ affine
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    grid = np.moveaxis(np.mgrid[:h, :w].astype(np.float64), 0, -1)  # (h, w, 2)
    x = _read_at(x, grid @ affine[:2] + affine[2], "mirror")
    field = rng.uniform(-1, 1, (h, w, 2))
    if amplitude == 0:
        return x
    sigma = smoothness * scale
    # smoothing over sigma pixels leaves a displacement in proportion to amplitude / sigma, which is to grow with scale
    field = gaussian_filter(field, (sigma, sigma, 0), mode="reflect", truncate=3) * amplitude * scale**2
    return _read_at(x, grid + field, "reflect")


def _read_at(x: Array, place: Array, mode: Literal["mirror", "reflect"]) -> Array:
    """Return ``x (h, w, channels)`` interpolated at ``place (h, w, 2)``, rows and columns."""
    where = np.moveaxis(place, -1, 0)
    return np.stack([map_coordinates(x[..., c], where, order=1, mode=mode) for c in range(x.shape[2])], axis=-1)


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
    return pixels if pixels.ndim == 3 else pixels[..., None]  # (h, w, C), of gray (h, w, 1)


FUNCTIONS = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, _weather.snow,
        _weather.frost, _weather.fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression, speckle_noise,
        gaussian_blur, _weather.spatter, saturate,
    )
}  # fmt: skip
