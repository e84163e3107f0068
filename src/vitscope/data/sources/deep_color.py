"""Read all 16 bits of color samples, of which Pillow's modes hold the upper 8.

Pillow has no mode for color of 16 bits: its raw modes ``RGB;16B`` (big-endian) and ``RGB;16L`` (little-endian) take the upper
byte of each sample. Read again in the other byte order, the same raw mode takes the lower one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

#: letter of the other byte order by the raw mode's letter; N is the machine's own order, which libtiff decodes to
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
#: raw modes whose samples can be read as they are stored; the others (gray with alpha, CMYK, single planes) are converted
_STORED = ("RGB", "RGBX", "RGBA", "RGBa")


def raw_mode(image: Image.Image) -> str | None:
    """Return how the color samples of 16 bits of an image that is not loaded yet are stored, None for all other images."""
    if image.mode.startswith("I") or not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return None
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) and ";16" in first else None


def can_be_read(raw: str) -> bool:
    """Tell whether `samples` reads that raw mode."""
    kind, _, order = raw.partition(";16")
    return kind in _STORED and order in _SWAPPED


def samples(
    file: str | Path | bytes, formats: tuple[str, ...], oriented: Callable[[Image.Image], Image.Image]
) -> np.ndarray:
    """Return the samples of a color image of 16 bits, `(height, width, 3 or 4)` in uint16, as the file stores them.

    Args:
        file: The file's path or its bytes, for which `can_be_read` holds.
        formats: Pillow's decoders to use.
        oriented: Turns an image as its file says, where Pillow has not done so (it does for TIFF).
    """
    upper, lower = (_bytes(file, formats, oriented, is_swapped) for is_swapped in (False, True))
    return (upper.astype(np.uint16) << 8) | lower


def is_premultiplied(raw: str) -> bool:
    """Tell whether the colors are stored multiplied by their alpha."""
    return raw.startswith("RGBa")


def _bytes(
    file: str | Path | bytes, formats: tuple[str, ...], oriented: Callable[[Image.Image], Image.Image], is_swapped: bool
) -> np.ndarray:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [tile._replace(args=_read_as(tile.args, is_swapped)) for tile in image.tile]
        image.load()
        return np.asarray(oriented(image))


def _read_as(arguments: str | tuple[Any, ...] | None, is_swapped: bool) -> str | tuple[Any, ...]:
    """Return a tile's arguments with the raw mode of the byte order, and without a division by alpha."""
    if isinstance(arguments, tuple):
        return (_read_as(arguments[0], is_swapped), *arguments[1:])
    kind, _, order = str(arguments).partition(";16")
    kind = kind.replace("RGBa", "RGBA")
    return f"{kind};16{_SWAPPED[order] if is_swapped else order}"
