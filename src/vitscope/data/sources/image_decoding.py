"""Decode an image file to 8-bit RGB: orientation, transparency and sample range by stated rules.

- Only the formats of `FORMATS` are decoded, whatever the file's extension says.
- The orientation of EXIF is applied.
- Transparent pixels show a stated background, not the colors that are stored under them.
- 16-bit samples, gray or color, are scaled by 1/257 (12-bit TIFF by 255/4095), so that full scale is 255. 32-bit integers and
  floats have no scale of their own and are refused unless a range is stated. Color of 16 bits that Pillow gives no access to
  (with gray and alpha, CMYK, a plane for each channel) and signed 8-bit samples are refused.
- The first frame of an animation or of a file with several pages is used, with a notice.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from vitscope.data import file_descriptors
from vitscope.data.sources import deep_color
from vitscope.data.sources.notices import report_once
from vitscope.runtime.errors import DataError

#: Pillow's decoders that are used. Its others (EPS, PSD, FITS, ...) are never started by a file's content.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "PPM")

#: Extensions of image files, in small letters.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".pnm",
)  # fmt: skip

WHITE = (255, 255, 255)
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284  # tags of TIFF
_SAMPLE_FORMAT, _SIGNED = 339, 2  # tag of TIFF, and a value of it


@dataclass(frozen=True)
class _Conversion:
    """Settings by which the samples of one file become 8-bit RGB.

    Attributes:
        path: The file, for errors.
        background: Red, green and blue, 0 to 255, behind transparent pixels.
        pixel_range: Decoded sample values that become 0 and 255; None: 0 and full scale.
        full_scale: The sample value that is white; None for 8-bit samples and where nothing tells it.
        content: The file's bytes; None to read it at `path`.
    """

    path: str | Path
    background: tuple[int, ...]
    pixel_range: Sequence[float] | None
    full_scale: float | None
    content: bytes | None = None


def read_image(
    path: str | Path,
    *,
    background: Sequence[int] = WHITE,
    pixel_range: Sequence[float] | None = None,
    key: str = "data.root",
    content: bytes | None = None,
) -> Image.Image:
    """Return a file's image in mode RGB.

    Args:
        path: The file.
        background: Red, green and blue, 0 to 255, that show through transparent pixels.
        pixel_range: Sample values that become 0 and 255, for images whose samples are not of 8 bits; None: 0 and full scale for
            16-bit samples, gray and color, while 32-bit integers and floats are refused.
        key: Configuration key that errors name.
        content: The file's bytes, where they are at hand; `path` is then a name for errors.

    Raises:
        DataError: A file that is missing, damaged, too large, of another format, or of samples without a range.
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
            raise DataError(key, None, f"{path} is not a regular file", "remove it")
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            _refuse_signed_bytes(image, path, key)
            _report_frames(image, path)
            full_scale = _full_scale(image)
            pixel_range = _range_as_decoded(image, pixel_range, path)
            conversion = _Conversion(path, tuple(background), pixel_range, full_scale, content)
            if (raw := _raw_sixteen_bits(image, path)) is not None:
                return _sixteen_bit_color(image, raw, conversion)
            image.load()
            return _to_rgb(_oriented(image, path), conversion)
    except (MemoryError, DataError):
        raise
    except Image.DecompressionBombError as error:
        problem = f"{path} has more pixels than Pillow's limit ({' '.join(str(error).split())})"
        raise DataError(key, None, problem, "make the image smaller, or remove it") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        if file_descriptors.is_shortage(error):
            raise file_descriptors.shortage() from error
        problem = f"{path} cannot be read as an image ({' '.join(str(error).split())})"
        raise DataError(key, None, problem, f"replace or remove the file; read are {', '.join(FORMATS)}") from error


def _refuse_signed_bytes(image: Image.Image, path: str | Path, key: str) -> None:
    """Refuse TIFF samples that Pillow would read as unsigned: -1 would be white."""
    signed = _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ())
    if signed and image.mode in ("L", "LA", "RGB", "RGBA"):
        raise DataError(key, None, f"the samples of {path} are signed 8-bit integers", "write it with unsigned samples")


def _oriented(image: Image.Image, path: str | Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # the pixels are good, only their description is not
        report_once(f"{path}: its EXIF data cannot be read ({error}); no orientation is applied")
        return image


def _report_frames(image: Image.Image, path: str | Path) -> None:
    if image.format != "MPO" and (n := getattr(image, "n_frames", 1)) > 1:
        report_once(f"{path}: the first of its {n} frames is used")


def _full_scale(image: Image.Image) -> float | None:
    """Return the sample value that is white, None for 8-bit modes and where nothing tells it."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return float(2 ** min(int(bits[0]), 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16-bit samples, which Pillow holds in 32 bits
        return 65535.0
    return None


def _range_as_decoded(
    image: Image.Image, pixel_range: Sequence[float] | None, path: str | Path
) -> Sequence[float] | None:
    """Return a stated range in the samples that Pillow gives: those of a PPM with another maximum are rescaled by it.

    Raises:
        DataError: A range was stated for color that Pillow has reduced to 8 bits.
    """
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    arguments = tiles[0].args if image.format == "PPM" and tiles else None
    if pixel_range is None or not isinstance(arguments, tuple) or arguments[1] <= 255:
        return pixel_range
    if image.mode != "I":
        problem = f"{path} holds color of more than 8 bits, to which no range can be applied in this format"
        raise DataError("data.pixel_range", list(pixel_range), problem, "save it as a PNG of 16 bits")
    return [value * 65535 / arguments[1] for value in pixel_range]


def _raw_sixteen_bits(image: Image.Image, path: str | Path) -> str | None:
    """Return how color of 16 bits is stored, None for all other images.

    Raises:
        DataError: In a way that cannot be read: Pillow takes planes of 16 bits for ones of 8, and reduces others.
    """
    raw = deep_color.raw_mode(image)
    tags = getattr(image, "tag_v2", {})
    has_planes = tags.get(_PLANAR_CONFIGURATION, 1) == 2 and max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8
    if has_planes or (raw is not None and not deep_color.can_be_read(raw)):
        storage = "a plane for each channel" if has_planes else str(raw).partition(";")[0]
        problem = f"the 16-bit samples of {path} are stored in a way that is not read ({storage})"
        raise DataError("data.root", None, problem, "save it as RGB or RGBA, or with 8 bits a sample")
    return raw


def _sixteen_bit_color(image: Image.Image, raw: str, conversion: _Conversion) -> Image.Image:
    """Return color of 16 bits a sample, scaled linearly to 0..255 over the background, with the orientation of the file."""
    file = conversion.path if conversion.content is None else conversion.content
    sample_values = deep_color.samples(file, FORMATS, lambda part: _oriented(part, conversion.path)).astype(np.float64)
    color, alpha = sample_values[..., :3], np.ones((*sample_values.shape[:2], 1))
    if sample_values.shape[2] == 4:
        alpha = sample_values[..., 3:] / 65535
        if deep_color.is_premultiplied(raw):
            color = color / np.where(alpha > 0, alpha, 1)
    elif isinstance(transparent_color := image.info.get("transparency"), tuple):  # the color that is transparent
        alpha = 1.0 - (color == transparent_color).all(axis=2, keepdims=True)
    low, high = conversion.pixel_range or (0.0, 65535.0)
    blended = np.clip((color - low) / (high - low), 0, 1) * alpha + np.array(conversion.background) / 255 * (1 - alpha)
    return Image.fromarray(np.round(255 * blended).astype(np.uint8))


def _to_rgb(image: Image.Image, conversion: _Conversion) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, conversion)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _composited(image.convert("RGBA"), conversion.background)
    return image.convert("RGB")


def _composited(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    background_image = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(background_image, image).convert("RGB")


def _scaled(image: Image.Image, conversion: _Conversion) -> Image.Image:
    """Return samples of more than 8 bits scaled linearly to 0..255, gray in three channels."""
    if conversion.pixel_range is None and conversion.full_scale is None:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        problem = f"the samples of {conversion.path} are {kind}, which have no scale of their own"
        fix = "set data.pixel_range=[<black>,<white>] to the values that are black and white, such as [0,1]"
        raise DataError("data.pixel_range", None, problem, fix)
    low, high = conversion.pixel_range or (0.0, float(conversion.full_scale or 1))
    samples = np.asarray(image).astype(np.float64)
    if not np.isfinite(samples).all():
        raise DataError(
            "data.root", None, f"{conversion.path} has samples that are not finite", "replace or remove the file"
        )
    gray = np.round(255 * np.clip((samples - low) / (high - low), 0, 1)).astype(np.uint8)
    result = Image.fromarray(gray).convert("RGB")
    if isinstance(transparent_value := image.info.get("transparency"), int):  # the gray value that is transparent
        alpha = Image.fromarray(np.where(samples == transparent_value, 0, 255).astype(np.uint8))
        result.putalpha(alpha)
        return _composited(result, conversion.background)
    return result
