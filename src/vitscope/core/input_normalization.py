"""Between a model's normalized inputs and pixels in [0, 1], where noise, corruptions and attacks are defined,
and in which figures show images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.unlikely_input import UnlikelyInputWarning
from vitscope.core.probe import Probe

#: pixels farther than this from [0, 1] come from a mean and a standard deviation of other units, such as 0 to 255
_OTHER_UNITS = 10.0
#: pixels nearer than this to [0, 1] are those of filters and augmentations that overshoot
_OVERSHOOT = 0.25


@dataclass(frozen=True)
class Pixels:
    """A data set's normalization, ``input = (pixel - mean) / std`` for each channel.

    Attributes:
        mean: (C, 1, 1), or (1, 1, 1) for all channels alike.
        std: Standard deviation, of the same shape and above 0.
    """

    mean: Tensor
    std: Tensor

    def to_pixels(self, x: Tensor) -> Tensor:
        """Return the pixels of normalized images ``(B, C, H, W)``, in their dtype and on their device."""
        return x * self.std.to(x) + self.mean.to(x)

    def to_input(self, pixels: Tensor) -> Tensor:
        """Return what the model takes for pixels ``(B, C, H, W)`` in [0, 1]."""
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)


def pixels_of(probe: Probe, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Pixels:
    """Return the normalization of a probe's data: the values given here, else those of ``probe.about``.

    A warning says where the first batch can hardly have been normalized by it.

    Raises:
        ValueError: Neither is there, their lengths differ, a standard deviation is not above 0, or the first batch would
            lie far from [0, 1].
    """
    pixels = stated_pixels(probe, mean, std)
    images = probe.first_images()
    if isinstance(images, Tensor) and images.ndim == 4:
        _check_range(pixels, images)
    return pixels


def stated_pixels(probe: Probe, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Pixels:
    """Return what `pixels_of` does, without a look at the images.

    Raises:
        ValueError: Neither is there, their lengths differ, or a standard deviation is not above 0.
    """
    mean = mean if mean is not None else probe.about.get("mean")
    std = std if std is not None else probe.about.get("std")
    if mean is None or std is None:
        raise ValueError(
            "Expected the normalization of the data (images are changed in pixel space), received none: pass mean=... and "
            "std=..., or Probe(..., about={'mean': ..., 'std': ...}); mean=[0], std=[1] for images that are pixels already."
        )
    # two of (C, 1, 1)
    m, s = (torch.as_tensor(list(values), dtype=torch.float64)[:, None, None] for values in (mean, std))
    if m.shape != s.shape or not bool((s > 0).all()):
        raise ValueError(
            f"Expected one mean and one std above 0 for each channel, received {list(mean)} and {list(std)}."
        )
    return Pixels(m, s)


def _check_range(pixels: Pixels, x: Tensor) -> None:
    if len(pixels.mean) not in (1, x.shape[1]):
        return
    low, high = (float(end) for end in torch.aminmax(pixels.to_pixels(x.detach().double())))
    raw_low, raw_high = (float(end) for end in torch.aminmax(x))
    stated = " and ".join(f"{key}={_listed(t.flatten().tolist())}" for key, t in vars(pixels).items())
    if max(-low, high - 1) > _OTHER_UNITS:
        raise ValueError(
            f"Expected pixels x * std + mean in [0, 1] with {stated}, received {low:.3g} to {high:.3g}: give mean and std of "
            "pixels in [0, 1], as [0.485, 0.456, 0.406] and not [123.7, 116.3, 103.5]."
        )
    if max(-low, high - 1) > _OVERSHOOT:
        reason = f"its pixels x * std + mean go from {low:.3g} to {high:.3g}"
    elif raw_low >= 0 and raw_low < raw_high <= 1 and float(pixels.mean.min()) > 0.1:
        reason = "its values lie in [0, 1], as those of pixels that are not normalized (mean=[0], std=[1])"
    else:
        return
    text = f"the first batch does not look normalized by {stated}: {reason}; changes of pixels are scaled by that std"
    warnings.warn(text, UnlikelyInputWarning, stacklevel=4)


def _listed(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"


def shown_images(probe: Probe, count: int) -> np.ndarray:
    """Return the first ``count`` images ``(n, H, W, 3)`` as uint8, the same on every rank.

    Where the probe's facts lack the normalization of these channels, the smallest value of all these images becomes 0 and the
    largest 255. One channel is gray, of more than three the first three are taken. Empty for a model that takes more than images.
    """
    if not probe.takes_images:
        return np.zeros((0, 0, 0, 3), dtype=np.uint8)
    parts: list[Tensor] = []
    for x, _ in probe.batches:
        parts.append(x[: count - sum(map(len, parts))].detach().cpu().double())
        if sum(map(len, parts)) >= count:
            break
    x = torch.cat(parts)
    if len(probe.about.get("mean", ())) in (1, x.shape[1]) and "std" in probe.about:
        x = stated_pixels(probe).to_pixels(x)
    else:
        low, high = x.min(), x.max()
        x = (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return (x.nan_to_num(0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
