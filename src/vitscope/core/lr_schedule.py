"""The learning rate as a function of the step: linear warm-up by iteration, then cosine, milestones or constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitscope.runtime.value_ranges import NonNegativeFloat, NonNegativeInt, UnitInterval


def factor(
    step: int,
    *,
    steps_per_epoch: int,
    total_epochs: float,
    kind: str = "cosine",
    warmup_epochs: NonNegativeFloat = 0.0,
    warmup_steps: NonNegativeInt | None = None,
    per_epoch: bool = False,
    min_factor: UnitInterval = 0.0,
    milestones: Sequence[float] = (),
    gamma: NonNegativeFloat = 0.2,
) -> float:
    """Return the factor of the base learning rate at optimizer step ``step``, counted from 0.

    During the warm-up it rises linearly by iteration and reaches 1 with the last of them; the first step
    already moves, unlike the official code's, whose first step has rate 0. Then, with e the epochs since warm-up and E
    those left after it: ``cosine`` is min + (1 - min)(1 + cos(pi e / E)) / 2; ``multistep`` is gamma to the number of
    milestones passed, milestones counted in epochs after warm-up; ``constant`` is 1.

    Args:
        step: The optimizer step that is about to be made.
        steps_per_epoch: Optimizer steps an epoch.
        total_epochs: Epochs of training, warm-up included.
        kind: ``cosine``, ``multistep`` or ``constant``.
        warmup_epochs: Length of the warm-up.
        warmup_steps: Length of the warm-up in optimizer steps, in place of ``warmup_epochs``: of equal length also where
            trainings of as many steps see different amounts of data.
        per_epoch: Whether to hold the rate within an epoch, as the official code does.
        min_factor: Factor at which the cosine ends.
        milestones: Epochs after warm-up at which the rate is multiplied by ``gamma``.
        gamma: Factor of the rate at each of ``milestones``.

    Raises:
        ValueError: An unknown kind.
    """
    if warmup_steps is None:
        warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    epoch = (step - warmup_steps) / steps_per_epoch
    if per_epoch:
        epoch = math.floor(epoch)
    if kind == "constant":
        return 1.0
    if kind == "multistep":
        return gamma ** sum(epoch >= milestone for milestone in milestones)
    if kind == "cosine":
        epochs_after_warmup = max(total_epochs - warmup_steps / steps_per_epoch, 1 / steps_per_epoch)
        return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs_after_warmup, 1.0)))
    raise ValueError(f"Expected kind to be cosine, multistep or constant, received {kind!r}.")
