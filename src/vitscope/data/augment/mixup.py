"""Seeded mixup and CutMix of a whole batch of any size, with the numbers of timm's `Mixup`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from timm.data.mixup import mixup_target
from torch import Tensor

from vitscope.core.objective import IGNORED_LABEL
from vitscope.data import range_checks
from vitscope.runtime.value_ranges import NonNegativeFloat, ShareBelowOne, UnitInterval


@dataclass(frozen=True)
class Mixing:
    """The mixing part of an objective.

    Attributes:
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of CutMix, 0 for none.
        switch_prob: Probability of CutMix where both are on.
        label_smoothing: Part of the soft targets.

    Raises:
        ConfigError: A value out of its range.
    """

    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    switch_prob: UnitInterval = 0.5
    label_smoothing: ShareBelowOne = 0.0

    def __post_init__(self) -> None:
        for name, high in (("mixup", math.inf), ("cutmix", math.inf), ("switch_prob", 1.0), ("label_smoothing", 1.0)):
            range_checks.number(f"objective.{name}", getattr(self, name), 0, high)

    @property
    def on(self) -> bool:
        """Whether batches are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0

    def __str__(self) -> str:
        """Say it in words, for a card."""
        parts = [f"mixup {self.mixup:g}", f"cutmix {self.cutmix:g}", f"switch {self.switch_prob:g}"]
        return f"{', '.join(parts)}, smoothing {self.label_smoothing:g}"


def mix(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    switch_prob: float = 0.5,
    label_smoothing: float = 0.0,
    seed: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Mix each image with its mirror image in the batch: one lambda, partner of image i is B - 1 - i.

    The numbers are those of timm's `Mixup` in batch mode after ``np.random.seed`` with the same words. timm refuses an odd
    number of images; here the middle one is mixed with itself.

    Args:
        x: Images `(B, C, H, W)`; left alone.
        y: Class indices `(B,)`.
        num_classes: Length of a soft target.
        mixup: Alpha of the beta distribution of mixup's lambda; 0 for no mixup.
        cutmix: Alpha of CutMix; 0 for no CutMix.
        switch_prob: Probability of CutMix where both are on.
        label_smoothing: Part of the soft targets, so they are never smoothed again.
        seed: Any non-negative integers, such as (seed, global step).

    Returns:
        Mixed images and soft targets `(B, num_classes)` float32. With both alphas 0: the images and their
        smoothed one-hot targets.

    Raises:
        ValueError: `y` is not one class index per image, or an image has no label.
    """
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point():
        raise ValueError(f"Expected {len(x)} class indices, received {y.dtype} of shape {tuple(y.shape)}.")
    if bool((y == IGNORED_LABEL).any()):
        raise ValueError(
            f"Expected a label for every image, received {IGNORED_LABEL} (ignored): set mixup=0 and cutmix=0."
        )
    if mixup <= 0 and cutmix <= 0:
        return x, mixup_target(y, num_classes, 1.0, label_smoothing)
    words = np.random.SeedSequence(seed).generate_state(8)
    generator = np.random.RandomState(words)
    mixed, lam = _mix_images(x, mixup, cutmix, switch_prob, generator)
    return mixed, mixup_target(y, num_classes, lam, label_smoothing)


def _mix_images(
    x: Tensor, mixup: float, cutmix: float, switch_prob: float, generator: np.random.RandomState
) -> tuple[Tensor, float]:
    """Return mixed images and the share of each image that is its own."""
    generator.random_sample()  # timm draws whether to mix at all, with probability 1
    use_cutmix = generator.random_sample() < switch_prob if mixup > 0 and cutmix > 0 else cutmix > 0
    alpha = cutmix if use_cutmix else mixup
    lam = float(generator.beta(alpha, alpha))
    if lam == 1:
        return x.clone(), lam
    if not use_cutmix:
        return x * lam + x.flip(0) * (1 - lam), lam
    rows, columns = _box(x.shape[-2], x.shape[-1], lam, generator)
    mixed = x.clone()
    mixed[:, :, rows, columns] = x.flip(0)[:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / float(x.shape[-2] * x.shape[-1])


def _box(height: int, width: int, lam: float, generator: np.random.RandomState) -> tuple[slice, slice]:
    """Return rows and columns of CutMix's box: a share ``1 - lam`` of the image, less what lies outside of it."""
    ratio = math.sqrt(1 - lam)
    box_height, box_width = int(height * ratio), int(width * ratio)
    row, column = int(generator.randint(0, height)), int(generator.randint(0, width))
    rows = slice(max(row - box_height // 2, 0), min(row + (box_height + 1) // 2, height))
    columns = slice(max(column - box_width // 2, 0), min(column + (box_width + 1) // 2, width))
    return rows, columns
