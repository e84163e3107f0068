"""Mixup and CutMix of a whole batch, seeded: timm's, for any batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from vitscope.core.objective import IGNORED_LABEL
from vitscope.data import range_checks


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

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0

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

    timm's `Mixup` in batch mode, drawn from numpy's global state seeded by `seed`; that state is put back. With
    an odd number of images (which timm refuses) the middle one is mixed with itself.

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
        ValueError: `y` is not one class index an image, or an image has no label.
    """
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point():
        raise ValueError(f"Expected {len(x)} class indices, received {y.dtype} of shape {tuple(y.shape)}.")
    if bool((y == IGNORED_LABEL).any()):
        raise ValueError(
            f"Expected a label for every image, received {IGNORED_LABEL} (ignored): set mixup=0 and cutmix=0."
        )
    if mixup <= 0 and cutmix <= 0:
        return x, mixup_target(y, num_classes, 1.0, label_smoothing)
    mixer = Mixup(mixup, cutmix, switch_prob=switch_prob, num_classes=num_classes)
    mixed = x.clone()
    state = np.random.get_state()  # noqa: NPY002  timm draws from the global state
    try:
        np.random.seed(np.random.SeedSequence(seed).generate_state(8))  # noqa: NPY002
        lam = mixer._mix_batch(mixed)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return mixed, mixup_target(y, num_classes, lam, label_smoothing)
