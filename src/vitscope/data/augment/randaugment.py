"""RandAugment for a batch of byte images, distributed as timm's for the same configuration string.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (NeurIPS 2020),
with timm's choices: 15 operations, each of the chosen ones applied with probability 0.5, magnitude drawn from a
normal distribution and clipped, random sign, bilinear or bicubic at random, fill with the mean color. The
images of a batch are grouped by operation, so the cost is a few array operations per batch, not a call an image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from vitscope.data.augment import pillow_ops as ops
from vitscope.data.augment.pillow_ops import Bytes, Floats
from vitscope.runtime.errors import ConfigError

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_PLAIN: dict[str, Callable[[Bytes], Bytes]] = {
    "AutoContrast": ops.auto_contrast,
    "Equalize": ops.equalize,
    "Invert": ops.invert,
}
_GRADED: dict[str, Callable[[Bytes, Floats], Bytes]] = {
    "Posterize": ops.posterize,
    "Solarize": ops.solarize,
    "SolarizeAdd": ops.solarize_add,
    "Color": ops.color,
    "Contrast": ops.contrast,
    "Brightness": ops.brightness,
    "Sharpness": ops.sharpness,
}
_DRAWS_A_LAYER = 5  # operation, whether, magnitude, sign, interpolation
_MAX_TRANSLATION = 0.45


@dataclass(frozen=True)
class Policy:
    """A timm configuration string, taken apart.

    Attributes:
        magnitude: Mean strength, of 10.
        layers: Operations an image.
        std: Standard deviation of the strength; infinite: uniform from 0 to `magnitude`.
        prob: Probability that a chosen operation is applied.
        increasing: Use the variants whose effect grows with the magnitude.
        upper: Bound of the strength.
    """

    magnitude: float = 10.0
    layers: int = 2
    std: float = 0.0
    prob: float = 0.5
    increasing: bool = False
    upper: float = 10.0

    @classmethod
    @lru_cache(maxsize=16)
    def parse(cls, text: str) -> Policy:
        """Read `rand-m9-n2-mstd1.0` and the like (sections m, n, p, mstd, mmax, inc).

        Raises:
            ConfigError: Another section, or one without a number.
        """
        values: dict[str, float] = {}
        for section in text.split("-")[1:]:
            match = re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d*)?|inf)", section)
            if match is None:
                fix = "write it like rand-m9-n2-mstd1.0 (sections m, n, p, mstd, mmax, inc)"
                raise ConfigError("objective.augment", text, f"cannot read the section {section!r}", fix)
            values[match[1]] = float(match[2])
        std = values.get("mstd", 0.0)
        return cls(
            magnitude=values.get("m", 10.0),
            layers=int(values.get("n", 2)),
            std=math.inf if std > 100 else std,
            prob=values.get("p", 0.5),
            increasing=bool(values.get("inc", 0)),
            upper=values.get("mmax", 10.0),
        )

    @property
    def n_draws(self) -> int:
        """Uniforms that an image uses up."""
        return _DRAWS_A_LAYER * self.layers


@dataclass(frozen=True)
class Choice:
    """One layer's choice for each image of a batch; every field `(B,)`.

    Attributes:
        operation: Index in `OPERATIONS`.
        applied: Whether the operation is applied at all.
        level: Strength divided by 10.
        sign: -1 or 1, for the operations that have a direction.
        bicubic: Interpolation of the geometric operations.
    """

    operation: NDArray[np.int64]
    applied: NDArray[np.bool_]
    level: Floats
    sign: Floats
    bicubic: NDArray[np.bool_]


def choose(draws: Floats, policy: Policy) -> Choice:
    """Turn uniforms `(B, 5)` into one layer's choices."""
    operation, applied, strength, sign, interpolation = draws.T
    uniform = math.isinf(policy.std)
    noise = (strength - 1) * policy.magnitude if uniform else policy.std * ndtri(strength)
    return Choice(
        operation=(operation * len(OPERATIONS)).astype(np.int64),
        applied=applied <= policy.prob,
        level=np.clip(policy.magnitude + noise, 0, policy.upper) / 10,
        sign=np.where(sign > 0.5, -1.0, 1.0),
        bicubic=interpolation > 0.5,
    )


def rand_augment(images: Bytes, draws: Floats, policy: Policy, fill: tuple[int, ...]) -> Bytes:
    """Apply the policy.

    Args:
        images: Bytes `(B, 3, H, W)`, square; overwritten.
        draws: Uniforms `(B, policy.n_draws)`.
        policy: Operations per image and their strength.
        fill: Byte of each channel that geometric operations leave uncovered.

    Returns:
        `images`, augmented.
    """
    fill_bytes = np.array(fill, dtype=np.uint8)
    for layer in range(policy.layers):
        layer_draws = draws[:, layer * _DRAWS_A_LAYER : (layer + 1) * _DRAWS_A_LAYER]
        _apply(images, choose(layer_draws, policy), policy, fill_bytes)
    return images


def strength(name: str, choice: Choice, increasing: bool) -> Floats:
    """Return each image's argument of a graded operation: bits, threshold, amount or blending factor, `(B,)`."""
    level = choice.level
    if name == "Posterize":
        bits = np.trunc(level * 4)
        return 4 - bits if increasing else bits
    if name == "Solarize":
        threshold = np.minimum(256, np.trunc(level * 256))
        return 256 - threshold if increasing else threshold
    if name == "SolarizeAdd":
        return np.minimum(128, np.trunc(level * 110))
    return np.maximum(0.1, 1 + choice.sign * level * 0.9) if increasing else level * 1.8 + 0.1


def _apply(images: Bytes, choice: Choice, policy: Policy, fill: Bytes) -> None:
    number = np.where(choice.applied, choice.operation, -1)
    for name, plain in _PLAIN.items():
        if len(image_indices := np.flatnonzero(number == _NUMBER[name])):
            images[image_indices] = plain(images[image_indices])
    for name, graded in _GRADED.items():
        if len(image_indices := np.flatnonzero(number == _NUMBER[name])):
            strengths = strength(name, choice, policy.increasing)[image_indices]
            images[image_indices] = graded(images[image_indices], strengths)
    for bicubic in (False, True):
        same_filter = choice.bicubic == bicubic
        if len(image_indices := np.flatnonzero(same_filter & (number == _NUMBER["Rotate"]))):
            degrees = 30 * (choice.sign * choice.level)[image_indices]
            images[image_indices] = ops.rotate(images[image_indices], degrees, fill, bicubic=bicubic)
        if len(image_indices := np.flatnonzero(same_filter & (number >= _NUMBER["ShearX"]))):
            images[image_indices] = _shifted(images[image_indices], choice, image_indices, fill, bicubic)


def _shifted(images: Bytes, choice: Choice, image_indices: NDArray[np.int64], fill: Bytes, bicubic: bool) -> Bytes:
    """Shear or translate square images, those along y as their transposes along x."""
    size = images.shape[-1]
    number = choice.operation[image_indices, None]  # (B, 1)
    signed_level = (choice.sign * choice.level)[image_indices, None]  # (B, 1)
    is_shear = (number == _NUMBER["ShearX"]) | (number == _NUMBER["ShearY"])
    shear = signed_level * 0.3 * (np.arange(size) + 0.5)  # (B, H)
    shift = np.where(is_shear, shear, signed_level * _MAX_TRANSLATION * size)  # (B, H)
    along_y = (number == _NUMBER["ShearY"]) | (number == _NUMBER["TranslateYRel"])
    flipped = along_y[..., None, None]  # (B, 1, 1, 1)
    # (B, 3, H, W), rows and columns exchanged where flipped
    upright = np.where(flipped, images.transpose(0, 1, 3, 2), images)
    shifted = ops.shift_rows(upright, shift, fill, bicubic=bicubic)
    return np.where(flipped, shifted.transpose(0, 1, 3, 2), shifted)
