"""Save figures for pages of the documentation: WebP files below a number of bytes."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

#: pixels of a figure's larger side at most
SIZE = 1200
#: bytes of a figure's file at most
LIMIT = 100_000
_QUALITIES = (82, 70, 55, 40)


def save_webp(figure: Figure, file: Path, limit: int = LIMIT) -> Path:
    """Write a figure at the best quality whose file has at most ``limit`` bytes.

    Raises:
        ValueError: No quality gives so small a file.
    """
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=200, format="png")
    image = Image.open(pixels).convert("RGB")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        content = io.BytesIO()
        image.save(content, format="webp", quality=quality, method=6)
        if len(content.getvalue()) <= limit:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.getvalue())
            return file
    raise ValueError(f"Expected a figure of at most {limit} bytes, received {len(content.getvalue())} for {file.name}.")
