"""Pillow's image operations for many byte images at once, each image with its own strength.

Every function takes bytes `(B, 3, H, W)` and returns new bytes of that shape: the bytes that Pillow gives for
each image by itself (`ImageOps`, `ImageEnhance`, `Image.transform`). Sums are made of integers and everything
else is elementwise, so an image's result does not depend on its neighbors in the batch. In numpy, whose calls
cost a third of torch's on arrays this small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def auto_contrast(images: Bytes) -> Bytes:
    """Stretch each channel to the full range."""
    low = images.min((2, 3), keepdims=True).astype(np.float64)
    high = images.max((2, 3), keepdims=True).astype(np.float64)
    scale = 255.0 / np.maximum(high - low, 1)
    stretched = np.trunc(np.arange(256) * scale[..., 0] - low[..., 0] * scale[..., 0])  # (B, 3, 256)
    table = np.where(high[..., 0] > low[..., 0], stretched.clip(0, 255), np.arange(256)).astype(np.uint8)
    return _apply_table(table, images)


def equalize(images: Bytes) -> Bytes:
    """Make each channel's histogram as even as possible."""
    planes = images.reshape(images.shape[0] * images.shape[1], -1)  # (B, 3, H, W) to (B * 3, H * W)
    channel_offsets = np.arange(0, 256 * len(planes), 256)[:, None]  # (B * 3, 1)
    histogram = np.bincount((planes + channel_offsets).ravel(), minlength=256 * len(planes)).reshape(-1, 256)
    highest_count = np.take_along_axis(histogram, planes.max(1).astype(np.int64)[:, None], 1)  # its pixels
    step = (planes.shape[1] - highest_count) // 255  # (B * 3, 1); 0: left as it is
    counts_below = histogram.cumsum(1) - histogram
    equalized = ((step // 2 + counts_below) // np.maximum(step, 1)).clip(max=255)
    table = np.where(step > 0, equalized, np.arange(256)).astype(np.uint8)
    return _apply_table(table, images)


def invert(images: Bytes) -> Bytes:
    """Return 255 - x."""
    return ~images


def posterize(images: Bytes, bits: Floats) -> Bytes:
    """Keep the `bits` `(B,)` highest bits."""
    mask = (256 - 2 ** (8 - bits.astype(np.int64))).astype(np.uint8)
    return images & _per_image(mask)


def solarize(images: Bytes, threshold: Floats) -> Bytes:
    """Invert the pixels at or above `threshold` `(B,)`."""
    return np.where(images >= _per_image(threshold.astype(np.int16)), ~images, images)


def solarize_add(images: Bytes, amount: Floats) -> Bytes:
    """Add `amount` `(B,)` of at most 128 to the pixels below 128."""
    added = np.where(images < 128, _per_image(amount.astype(np.uint8)), np.uint8(0))
    return np.maximum(images + added, images)  # 127 + 128 is the most: no byte overflows


def color(images: Bytes, factor: Floats) -> Bytes:
    """Blend the gray version with the image: factor `(B,)` 0 is gray, 1 no change."""
    return _blend(_luma(images), images, factor)


def contrast(images: Bytes, factor: Floats) -> Bytes:
    """Blend the image's mean gray with the image by `factor` `(B,)`."""
    luma = _luma(images)
    pixels = luma.shape[-2] * luma.shape[-1]
    mean = (2 * luma.sum((1, 2, 3), keepdims=True) + pixels) // (2 * pixels)  # rounded half up
    return _blend(mean, images, factor)


def brightness(images: Bytes, factor: Floats) -> Bytes:
    """Blend black with the image by `factor` `(B,)`."""
    return _blend(np.zeros((1, 1, 1, 1)), images, factor)


def sharpness(images: Bytes, factor: Floats) -> Bytes:
    """Blend a smoothed version with the image by `factor` `(B,)`; the outermost pixels stay."""
    x = images.astype(np.int16)
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    weighted = box + 4 * x[..., 1:-1, 1:-1]  # the kernel (1 1 1; 1 5 1; 1 1 1) / 13
    smooth = images.copy()
    smooth[..., 1:-1, 1:-1] = (2 * weighted + 13) // 26
    return _blend(smooth, images, factor)


def rotate(images: Bytes, degrees: Floats, fill: Bytes, *, bicubic: bool) -> Bytes:
    """Turn each image about its center, counter-clockwise by `degrees` `(B,)`.

    Args:
        images: Bytes `(B, 3, H, W)`.
        degrees: Angle of each image.
        fill: Byte of each channel `(3,)` for what lies outside.
        bicubic: Bicubic instead of bilinear interpolation.
    """
    batch, _, height, width = images.shape
    angle = -np.radians(degrees)[:, None, None]
    # rounded as Pillow rounds, which also hides the last digit of a platform's cosine
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    source_x = cos * x + sin * y + (width / 2 - cos * (width / 2) - sin * (height / 2))  # (B, H, W)
    source_y = -sin * x + cos * y + (height / 2 + sin * (width / 2) - cos * (height / 2))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    columns, weight_x = _taps(source_x, width, bicubic)  # (taps, B, H, W)
    rows, weight_y = _taps(source_y, height, bicubic)
    first_pixel = (np.arange(batch, dtype=np.int32) * (height * width))[:, None, None]
    pixel_indices = columns[:, None] + (rows * np.int32(width) + first_pixel)  # (taps, taps, B, H, W), rows second
    interpolate = _cubic if bicubic else _linear
    return _fill_outside(
        interpolate(interpolate(_gather_pixels(images, pixel_indices), weight_x), weight_y), inside, fill
    )


def shift_rows(images: Bytes, shift: Floats, fill: Bytes, *, bicubic: bool) -> Bytes:
    """Move the row y of each image to the left by `shift[:, y]` pixels: translation and shear along x.

    Args:
        images: Bytes `(B, 3, H, W)`.
        shift: Pixels `(B, H)`.
        fill: Byte of each channel `(3,)` for what lies outside.
        bicubic: Bicubic instead of bilinear interpolation.
    """
    batch, _, height, width = images.shape
    source = (np.arange(width) + 0.5) + shift[..., None]  # (B, H, W)
    inside = (source >= 0) & (source < width)
    columns, weight = _taps(source, width, bicubic)  # (taps, B, H, W)
    first_pixel = (np.arange(batch * height, dtype=np.int32) * width).reshape(batch, height, 1)
    values = _gather_pixels(images, columns + first_pixel)
    interpolated = _cubic(values, weight) if bicubic else _linear(values, weight)
    return _fill_outside(interpolated, inside, fill)


def _taps(source: Floats, size: int, bicubic: bool) -> tuple[NDArray[np.int32], Floats]:
    """Return the pixels that coordinates `(B, H, W)` lie between, first axis the taps, and the weight."""
    floor = np.floor(source - 0.5)
    reach = np.arange(-1, 3) if bicubic else np.arange(2)
    taps = floor.astype(np.int32) + reach.astype(np.int32).reshape(-1, 1, 1, 1)
    return taps.clip(0, size - 1), (source - 0.5 - floor)[..., None]


def _gather_pixels(images: Bytes, pixel_indices: NDArray[np.int32]) -> Floats:
    """Return the pixels at `places` (of all images' pixels in a row), channels and an idle one last."""
    batch, _, height, width = images.shape
    pixels = np.zeros((batch, height, width, 4), dtype=np.uint8)
    pixels[..., :3] = images.transpose(0, 2, 3, 1)  # (B, 3, H, W) to (B, H, W, 3)
    packed = pixels.view(np.int32).ravel()  # a pixel is fetched at once
    return packed.take(pixel_indices)[..., None].view(np.uint8).astype(np.float64)


def _linear(taps: Floats, weight: Floats) -> Floats:
    return taps[0] + (taps[1] - taps[0]) * weight


def _cubic(taps: Floats, weight: Floats) -> Floats:
    """Interpolate between the middle two of four taps (the kernel with a = -1)."""
    t0, t1, t2, t3 = taps
    fall = t0 - t1
    third = t3 - t2
    third -= fall
    fall -= third  # now 2 (t0 - t1) + t2 - t3
    third *= weight
    third += fall
    third *= weight
    third += t2
    third -= t0
    third *= weight
    third += t1
    return third


def _fill_outside(values: Floats, inside: NDArray[np.bool_], fill: Bytes) -> Bytes:
    """Return the values `(B, H, W, 4)` as bytes `(B, 3, H, W)`, `fill` outside."""
    packed = values.clip(0, 255, out=values).astype(np.uint8).view(np.int32)[..., 0]  # truncated, as Pillow does
    outside = np.append(fill, np.uint8(0)).view(np.int32)
    pixels = np.where(inside, packed, outside)[..., None].view(np.uint8)[..., :3]  # (B, H, W, 3)
    return pixels.transpose(0, 3, 1, 2)


def _apply_table(table: Bytes, images: Bytes) -> Bytes:
    """Replace each byte by its entry in its channel's table, `(B, 3, 256)` or `(B * 3, 256)`."""
    planes = images.reshape(-1, images.shape[-2] * images.shape[-1])
    offsets = np.arange(0, 256 * len(planes), 256, dtype=np.int32)[:, None]
    return table.ravel().take(planes + offsets).reshape(images.shape)


def _luma(images: Bytes) -> NDArray[np.int32]:
    """Return the gray version `(B, 1, H, W)`, ITU-R 601-2 in 16-bit fixed point."""
    red, green, blue = images.astype(np.int32).transpose(1, 0, 2, 3)  # (B, H, W) each
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _blend(degenerate: NDArray[Any], images: Bytes, factor: Floats) -> Bytes:
    start = degenerate.astype(np.float32)
    blended = images - start
    blended *= _per_image(factor.astype(np.float32))
    blended += start
    return blended.clip(0, 255, out=blended).astype(np.uint8)  # truncated, as Pillow does


def _per_image(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(-1, 1, 1, 1)  # (B,) to (B, 1, 1, 1)
