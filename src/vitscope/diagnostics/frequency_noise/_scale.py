"""The scale of a probe's images: how far a change of one in pixels of [0, 1] moves what the model sees."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vitscope.core.input_normalization import pixels_of, stated_pixels
from vitscope.core.probe import Probe


def pixel_std(probe: Probe, std: Sequence[float] | None, measure: str) -> Tensor:
    """Return the standard deviations that the images were divided by, ``(C, 1, 1)`` or ``(1, 1, 1)``.

    Those given here, else ``probe.about["std"]``, else one, with a warning: a probe made by hand may hold pixels.

    Raises:
        ValueError: A standard deviation that is not above 0, or images that come to lie far from [0, 1].
    """
    if std is None and probe.about.get("std") is None:
        warnings.warn(
            f"{measure}: no normalization is known, so images are taken for pixels in [0, 1]; pass std=[...] or "
            "Probe(..., about={'mean': ..., 'std': ...})",
            stacklevel=3,
        )
        return torch.ones(1, 1, 1, dtype=torch.float64)
    deviations = list(std) if std is not None else list(probe.about["std"])
    if std is None and probe.about.get("mean") is not None:
        return pixels_of(probe).std
    return stated_pixels(probe, mean=[0.0] * len(deviations), std=deviations).std
