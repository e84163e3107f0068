"""`shapes`: procedural images in which shape and texture both tell the class, or contradict each other.

An image is one of eight shapes, filled with one of eight textures, on a plain background, at a random place,
size, angle and with random colors. In `train`, `val` and `test` shape k carries texture k. In `cue_conflict`
(after Geirhos et al., "ImageNet-trained CNNs are biased towards texture", ICLR 2019) every shape carries every
other texture equally often: labels are the shapes, `attributes["texture"]` the textures, so the share of
shape decisions among shape and texture decisions is a model's shape bias. `attributes["object_mask"]` is True
where at least half of a pixel lies inside the shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from vitscope.data import philox
from vitscope.data.sources.array_images import ArrayImages
from vitscope.runtime.errors import DataError
from vitscope.runtime.value_ranges import Seed

SIZE = 32
_OVERSAMPLING = 2  # outlines are drawn at twice the size and averaged
_DRAWS = 14
_CHUNK = 512  # images drawn at once

Array = NDArray[np.floating]

#: Split to number of images; in cue_conflict the 56 pairs of different shape and texture take turns.
SPLITS = {"train": 4096, "val": 512, "test": 1024, "cue_conflict": 1120}


def _polygon(corners: int) -> Callable[[Array, Array], Array]:
    """Return r / outline(angle) of a regular polygon with its corners on the unit circle: inside where below 1."""
    half = np.pi / corners
    return lambda x, y: np.hypot(x, y) * np.cos((np.arctan2(y, x) % (2 * half)) - half) / np.cos(half)


def _star(x: Array, y: Array) -> Array:
    angle = np.abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # 0 at a point, pi / 5 between
    return np.hypot(x, y) * (1 + 1.45 * angle / (np.pi / 5))


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x, y / 0.33), np.maximum(x / 0.33, y))


def _ring(x: Array, y: Array) -> Array:
    return 1 + np.abs(np.hypot(x, y) - 0.78) - 0.22


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y), 2 - np.hypot(x - 0.5, y) / 0.75)


#: Each maps coordinates to a value that is below 1 inside.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disk": np.hypot,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "flower": lambda x, y: np.hypot(x, y) / (0.72 + 0.28 * np.cos(4 * np.arctan2(y, x))),
}


def _wave(x: Array) -> Array:
    return 0.5 + 0.5 * np.sin(x)


#: Each maps coordinates in pixels (turned and shifted at random) and a frequency to a value in [0, 1].
TEXTURES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "stripes": lambda x, y, f: _wave(f * x),
    "checks": lambda x, y, f: 0.5 + 0.5 * np.sign(np.sin(f * x / 1.4) * np.sin(f * y / 1.4)),
    "dots": lambda x, y, f: (_wave(f * x) * _wave(f * y) > 0.45) * 1.0,
    "grid": lambda x, y, f: np.maximum(_wave(f * x / 1.3), _wave(f * y / 1.3)) ** 6,
    "zigzag": lambda x, y, f: _wave(f * x + 2.2 * np.abs((f * y / 3) % 2 - 1) * 2),
    "rings": lambda x, y, f: _wave(f * np.hypot(x, y)),
    "bricks": lambda x, y, f: (
        ((np.sin(f * y) > -0.7) & (np.sin(f * x / 2 + np.pi * (f * y // (2 * np.pi))) > -0.8)) * 1.0
    ),
    "ripples": lambda x, y, f: _wave(f * y + 1.5 * np.sin(f * x / 2)),
}


def load(split: str, *, root: str | None = None, split_seed: Seed = 0) -> ArrayImages:
    """Return a split: 4096, 512, 1024 or 1120 color images of 32x32 pixels.

    Args:
        split: `train`, `val`, `test` or `cue_conflict`.
        root: Not used; images are drawn.
        split_seed: Not used; the data set is always the same one.

    Raises:
        DataError: Unknown split.
    """
    if split not in SPLITS:
        raise DataError("data", "shapes", f"there is no split {split!r}", f"choose one of {', '.join(SPLITS)}")
    index = np.arange(SPLITS[split])
    n = len(SHAPES)
    shape = index % n
    texture = (shape + 1 + index // n % (n - 1)) % n if split == "cue_conflict" else shape
    epoch = list(SPLITS).index(split)
    draws = philox.uniforms(index, _DRAWS, seed=0, stream=philox.PIXELS, epoch=epoch)
    images = np.empty((len(index), 3, SIZE, SIZE), dtype=np.uint8)
    object_mask = np.empty((len(index), SIZE, SIZE), dtype=bool)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part], object_mask[part] = _draw(shape[part], texture[part], draws[part])
    attributes = {
        "shape": torch.from_numpy(shape),
        "texture": torch.from_numpy(texture),
        "object_mask": torch.from_numpy(object_mask),
    }
    return ArrayImages(torch.from_numpy(images), torch.from_numpy(shape), tuple(SHAPES), attributes)


def _draw(
    shape: NDArray[np.int64], texture: NDArray[np.int64], draws: Array
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return images `(B, 3, 32, 32)` and the masks `(B, 32, 32)` of their shapes."""
    # (B, draws) to one (B, 1, 1) a draw
    place_x, place_y, scale, shape_turn, texture_turn, frequency, shift_x, shift_y, *colors = draws.T[..., None, None]
    pixel = (np.arange(SIZE) + 0.5) - SIZE / 2
    mask = _mask(shape, 5 * place_x - 2.5, 5 * place_y - 2.5, 9 + 3.5 * scale, 2 * np.pi * shape_turn)
    x, y = _rotated(pixel, pixel[:, None], 2 * np.pi * texture_turn)
    x, y = x + 12 * shift_x - 6, y + 12 * shift_y - 6
    pattern = _select_by_row(list(TEXTURES.values()), texture, x, y, 1.2 + 0.5 * frequency)  # (B, 32, 32)
    red, green, blue, contrast, *background_draws = colors
    dark = np.stack((red, green, blue), axis=1) * 0.4  # (B, 3, 1, 1)
    filled = dark + (0.4 + 0.2 * contrast[:, None]) * pattern[:, None]
    background = 0.5 + 0.5 * np.stack(
        (background_draws[0], background_draws[1], background_draws[0] * background_draws[1]), axis=1
    )
    images = mask[:, None] * filled + (1 - mask[:, None]) * background  # (B, 3, 32, 32)
    return np.round(255 * images.clip(0, 1)).astype(np.uint8), mask >= 0.5


def _mask(shape: NDArray[np.int64], dx: Array, dy: Array, radius: Array, angle: Array) -> Array:
    """Return how much of each pixel lies inside the shape, `(B, 32, 32)`."""
    fine = (np.arange(SIZE * _OVERSAMPLING) + 0.5) / _OVERSAMPLING - SIZE / 2
    x, y = _rotated(fine - dx, fine[:, None] - dy, angle)
    inside = _select_by_row(list(SHAPES.values()), shape, x / radius, y / radius) < 1
    return inside.reshape(-1, SIZE, _OVERSAMPLING, SIZE, _OVERSAMPLING).mean((2, 4))


def _rotated(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _select_by_row(functions: list[Callable[..., Array]], number: NDArray[np.int64], *arguments: Array) -> Array:
    """Return function `number[i]` of the i-th rows of the arguments."""
    result = np.empty(np.broadcast_shapes(*(a.shape for a in arguments)))
    for index, function in enumerate(functions):
        rows = number == index
        result[rows] = function(*(argument[rows] for argument in arguments))
    return result
