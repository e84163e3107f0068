"""Pillow's image operations for many byte images at once, each image with its own strength.

Every function takes bytes `(B, C, H, W)` and returns new bytes of that shape: the bytes that Pillow gives for
each image by itself (`ImageOps`, `ImageEnhance`, `Image.transform`). Sums are made of integers and everything
else is elementwise, so an image's result does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range."""
    flat = images.flatten(2)
    low, high = flat.amin(2).double(), flat.amax(2).double()
    scale = 255.0 / (high - low).clamp(min=1)
    stretched = images * scale[..., None, None] - (low * scale)[..., None, None]
    constant = (high <= low)[..., None, None]
    return torch.where(constant, images, _bytes(stretched))


def equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram as even as possible."""
    batch, channels = images.shape[:2]
    flat = images.reshape(batch * channels, -1).long()
    rows = torch.arange(len(flat))[:, None]
    histogram = torch.bincount((flat + 256 * rows).flatten(), minlength=256 * len(flat)).view(-1, 256)
    highest = flat.amax(1, keepdim=True)
    step = (flat.shape[1] - histogram.gather(1, highest)) // 255  # (B * C, 1), 0: left as it is
    before = histogram.cumsum(1) - histogram
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256))
    return table.gather(1, flat).to(torch.uint8).view_as(images)


def invert(images: Tensor) -> Tensor:
    """Return 255 - x."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` `(B,)` highest bits."""
    mask = 256 - 2 ** (8 - bits.long())
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels at or above `threshold` `(B,)`."""
    return torch.where(images >= threshold.view(-1, 1, 1, 1), 255 - images, images)


def solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Add `amount` `(B,)` to the pixels below 128."""
    brighter = (images.short() + amount.short().view(-1, 1, 1, 1)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend the gray version with the image: factor `(B,)` 0 is gray, 1 no change."""
    return _blend(_luma(images).expand_as(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend the image's mean gray with the image by `factor` `(B,)`."""
    luma = _luma(images)
    pixels = luma.shape[-2] * luma.shape[-1]
    mean = (2 * luma.long().sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded half up
    return _blend(mean, images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend black with the image by `factor` `(B,)`."""
    return _blend(torch.zeros((), dtype=torch.uint8), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend a smoothed version with the image by `factor` `(B,)`; the outermost pixels stay."""
    x = images.short()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    weighted = box + 4 * x[..., 1:-1, 1:-1]  # the kernel (1 1 1; 1 5 1; 1 1 1) / 13
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((2 * weighted + 13) // 26).to(torch.uint8)
    return _blend(smooth, images, factor)


def affine(images: Tensor, matrix: Tensor, fill: Tensor, *, bicubic: bool) -> Tensor:
    """Resample each image at the coordinates that its matrix gives.

    Args:
        images: Bytes `(B, C, H, W)`.
        matrix: float64 `(B, 6)`: output pixel centre (x, y) reads (a x + b y + c, d x + e y + f).
        fill: Byte of each channel `(C,)` for what lies outside.
        bicubic: Bicubic instead of bilinear interpolation.
    """
    batch, channels, height, width = images.shape
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    a, b, c, d, e, f = matrix.T[..., None, None]  # each (B, 1, 1)
    source_x, source_y = a * x + b * y + c, d * x + e * y + f  # (B, H, W)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, top = (source_x - 0.5).floor(), (source_y - 0.5).floor()
    weight_x, weight_y = (source_x - 0.5 - left)[..., None], (source_y - 0.5 - top)[..., None]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    base = (torch.arange(batch) * (height * width))[:, None, None]
    reach = range(-1, 3) if bicubic else range(2)
    columns = [(left.long() + k).clamp(0, width - 1) for k in reach]

    def row(k: int) -> list[Tensor]:
        start = base + (top.long() + k).clamp(0, height - 1) * width
        return [pixels[start + column].double() for column in columns]  # each (B, H, W, C)

    interpolate = _cubic if bicubic else _linear
    value = interpolate([interpolate(row(k), weight_x) for k in reach], weight_y)
    result = torch.where(inside[..., None], _bytes(value), fill)
    return result.permute(0, 3, 1, 2).contiguous()


def _linear(taps: list[Tensor], weight: Tensor) -> Tensor:
    first, second = taps
    return first + (second - first) * weight


def _cubic(taps: list[Tensor], weight: Tensor) -> Tensor:
    """Interpolate between the middle two of four taps (the kernel with a = -1)."""
    t0, t1, t2, t3 = taps
    curve = 2 * (t0 - t1) + t2 - t3 + weight * (t1 - t0 - t2 + t3)
    return t1 + weight * (t2 - t0 + weight * curve)


def _luma(images: Tensor) -> Tensor:
    """Return the gray version `(B, 1, H, W)`, ITU-R 601-2 in 16-bit fixed point."""
    red, green, blue = images.int().split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    start = degenerate.float()
    return _bytes(start + factor.float().view(-1, 1, 1, 1) * (images.float() - start))


def _bytes(values: Tensor) -> Tensor:
    """Truncate to bytes, as Pillow does."""
    return values.clamp(0, 255).to(torch.uint8)
