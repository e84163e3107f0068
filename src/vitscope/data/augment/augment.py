"""Batched augmentation of byte images: crop, flip, RandAugment, normalize, erase.

Each image's parameters are drawn from its own counters, and each operation treats images apart, so an image
comes out bit-identical in whatever batch it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vitscope.data import range_checks
from vitscope.data.augment.randaugment import Policy, rand_augment
from vitscope.data.philox import Key, uniforms
from vitscope.data.sources.image_decoding import WHITE
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.value_ranges import PositiveInt, UnitInterval

CROP_PADDING = 4
_CROP_FLIP_DRAWS = 3
_ERASE_ATTEMPTS = 10
_ERASE_DRAWS = 1 + 4 * _ERASE_ATTEMPTS
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
# Draws of one image come in this order: crop and flip, erasing, RandAugment.
_RANDAUGMENT_FROM = _CROP_FLIP_DRAWS + _ERASE_DRAWS


@dataclass(frozen=True)
class Recipe:
    """Preprocessing and augmentation of an image between storage and model.

    Attributes:
        augment: `none`, `crop_flip`, or a timm RandAugment string such as `rand-m9-n2-mstd1.0` (after crop
            and flip).
        mean: Mean of each channel, pixels in [0, 1].
        std: Standard deviation of each channel, pixels in [0, 1].
        image_size: Height and width of what the model sees.
        flip: Whether crop_flip flips (left and right mean something for digits).
        crop_fill: Byte that pads the image before its random crop.
        random_erasing: Probability of erasing a rectangle to the mean.
        crop_pct: Share of the resized image that the center crop of files keeps.
        interpolation: Resizing filter of files.
        crop_mode: How files are brought to `image_size / crop_pct` before the crop: `center` (shorter side), `squash` (both
            sides, whatever their ratio) or `border` (longer side, the rest filled with the mean).
        background: Red, green and blue that show through transparent pixels of files.
        pixel_range: Samples of files that become black and white where they are not of 8 bits, see
            `vitscope.data.sources.image_decoding`.
    """

    augment: str = "none"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_size: PositiveInt = 32
    flip: bool = True
    crop_fill: int = 0
    random_erasing: UnitInterval = 0.0
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    background: tuple[int, ...] = WHITE
    pixel_range: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        range_checks.integer("data.image_size", self.image_size, 1)
        range_checks.channels("data.mean", self.mean, positive=False)
        range_checks.channels("data.std", self.std, positive=True)
        range_checks.number("data.crop_fill", self.crop_fill, 0, 255)
        range_checks.number("data.crop_pct", self.crop_pct, 0.01, 2)  # above 1 the image is enlarged by its border
        if self.crop_mode not in ("center", "squash", "border"):
            raise ConfigError("data.crop_mode", self.crop_mode, "unknown crop", "choose center, squash or border")
        if len(self.background) != 3 or any(value not in range(256) for value in self.background):
            problem = "not three integers from 0 to 255"
            raise ConfigError("data.background", list(self.background), problem, "give red, green and blue")
        if self.pixel_range is not None:
            _check_pixel_range(self.pixel_range)
        range_checks.number("objective.random_erasing", self.random_erasing, 0, 1)
        if self.interpolation not in ("bilinear", "bicubic", "nearest", "lanczos"):
            fix = "choose bilinear, bicubic, nearest or lanczos"
            raise ConfigError("data.interpolation", self.interpolation, "unknown filter", fix)
        if self.augment not in ("none", "crop_flip") and not self.augment.startswith("rand-"):
            problem = "unknown augmentation"
            fix = "choose none, crop_flip, or RandAugment such as rand-m9-n2-mstd1.0"
            raise ConfigError("objective.augment", self.augment, problem, fix)
        if self.augment.startswith("rand-"):
            Policy.parse(self.augment)

    def __str__(self) -> str:
        """Say in words what is random, for a card."""
        erasing = f" + erasing {self.random_erasing:g}" if self.random_erasing > 0 and self.augment != "none" else ""
        flip = "" if self.flip or self.augment == "none" else " without flip"
        return f"{self.augment}{flip}{erasing}"

    @property
    def preprocessing(self) -> str:
        """Say in words how files become pixels, for a card; `default` for a center crop, a white background and full scale."""
        descriptions = [] if self.crop_mode == "center" else [f"{self.crop_mode} crop"]
        if tuple(self.background) != WHITE:
            descriptions.append(f"background {', '.join(map(str, self.background))}")
        if self.pixel_range is not None:
            descriptions.append("samples from {:g} to {:g}".format(*self.pixel_range))
        return "; ".join(descriptions) or "default"

    def plain(self) -> Recipe:
        """Return the recipe of evaluation: resize, crop and normalize only."""
        return Recipe(
            mean=self.mean,
            std=self.std,
            image_size=self.image_size,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            background=self.background,
            pixel_range=self.pixel_range,
        )


def _check_pixel_range(values: tuple[float, ...]) -> None:
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] >= values[1]:
        problem = "not two finite numbers, the first below the second"
        raise ConfigError(
            "data.pixel_range", list(values), problem, "give the samples of black and white, such as [0,1]"
        )


def augment(images: Tensor, key: Key, recipe: Recipe) -> Tensor:
    """Return augmented bytes `(B, C, H, W)` for bytes of that shape; the input is left alone."""
    if recipe.augment == "none":
        return images
    policy = Policy.parse(recipe.augment) if recipe.augment.startswith("rand-") else None
    n = _RANDAUGMENT_FROM + (policy.n_draws if policy else 0)
    draws = uniforms(key.indices, n, seed=key.seed, stream=key.stream, epoch=key.epoch)
    images = crop_flip(images, draws[:, :_CROP_FLIP_DRAWS], flip=recipe.flip, fill=recipe.crop_fill)
    if policy is None:
        return images
    fill = tuple(min(255, round(255 * mean)) for mean in recipe.mean)
    return torch.from_numpy(rand_augment(images.numpy(), draws[:, _RANDAUGMENT_FROM:], policy, fill))


def crop_flip(images: Tensor, draws: NDArray[np.float64], *, flip: bool = True, fill: int = 0) -> Tensor:
    """Crop each image at random from its copy padded by 4, then mirror half of them.

    Args:
        images: Bytes `(B, C, H, W)`.
        draws: Uniforms `(B, 3)`: row, column, mirror.
        flip: Whether to mirror at all.
        fill: Byte of the padding.
    """
    height, width = images.shape[-2:]
    offsets = torch.from_numpy((draws[:, :2] * (2 * CROP_PADDING + 1)).astype(np.int64))  # (B, 2)
    rows = offsets[:, :1] + torch.arange(height)  # (B, H)
    columns = torch.arange(width).expand(len(images), -1)
    if flip:
        columns = torch.where(torch.from_numpy(draws[:, 2:] < 0.5), columns.flip(1), columns)
    columns = offsets[:, 1:] + columns  # (B, W)
    padded = pad(images, (CROP_PADDING,) * 4, value=fill).flatten(2)  # (B, C, (H + 8) (W + 8))
    places = (rows * (width + 2 * CROP_PADDING))[:, :, None] + columns[:, None, :]  # (B, H, W)
    return padded.gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return `(x / 255 - mean) / std` as float32 for bytes x `(B, C, H, W)`."""
    scale, shift = _scale_and_shift(mean, std)
    return images.float().mul_(scale).add_(shift)


def erase(images: Tensor, key: Key, recipe: Recipe) -> Tensor:
    """Set a random rectangle of some images to zero, in place, as timm's RandomErasing in mode `const`.

    Zhong et al., "Random Erasing Data Augmentation" (AAAI 2020): area 2% to 33% of the image, aspect ratio
    log-uniform in 0.3 to 3.3, up to ten attempts until the rectangle fits.

    Args:
        images: Normalized images `(B, C, H, W)`.
        key: Their counters.
        recipe: With the probability `random_erasing`; nothing happens where `augment` is `none`.
    """
    if recipe.random_erasing <= 0 or recipe.augment == "none":
        return images
    draws = uniforms(key.indices, _RANDAUGMENT_FROM, seed=key.seed, stream=key.stream, epoch=key.epoch)
    draws = draws[:, _CROP_FLIP_DRAWS:]
    height, width = images.shape[-2:]
    # (B, attempts * 4) to four of (B, attempts)
    area, aspect, top_edge, left_edge = np.moveaxis(draws[:, 1:].reshape(-1, _ERASE_ATTEMPTS, 4), -1, 0)
    area = (_ERASE_AREA[0] + (_ERASE_AREA[1] - _ERASE_AREA[0]) * area) * height * width
    aspect = np.exp(_ERASE_LOG_ASPECT[0] + (_ERASE_LOG_ASPECT[1] - _ERASE_LOG_ASPECT[0]) * aspect)
    rows, columns = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))  # (B, attempts)
    fits = (rows < height) & (columns < width)
    first = fits.argmax(1)[:, None]
    tops, lefts = np.floor(top_edge * (height - rows + 1)), np.floor(left_edge * (width - columns + 1))
    # (B, 1) each
    top_edge, left_edge, rows, columns = (np.take_along_axis(a, first, 1) for a in (tops, lefts, rows, columns))
    y, x = np.arange(height), np.arange(width)
    inside_y = (y >= top_edge) & (y < top_edge + rows)  # (B, H)
    inside_x = (x >= left_edge) & (x < left_edge + columns)  # (B, W)
    erased = fits.any(1) & (draws[:, 0] <= recipe.random_erasing)
    mask = erased[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return images.masked_fill_(torch.from_numpy(mask)[:, None], 0.0)
