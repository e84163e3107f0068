"""Between a model's normalised inputs and pixels in [0, 1], where noise, corruptions and attacks are defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitscope.core.probe import Probe


@dataclass(frozen=True)
class Pixels:
    """A data set's normalisation, ``input = (pixel - mean) / std`` for each channel.

    Attributes:
        mean: (C, 1, 1), or (1, 1, 1) for all channels alike.
        std: of the same shape, above 0.
    """

    mean: Tensor
    std: Tensor

    def to_pixels(self, x: Tensor) -> Tensor:
        """Return the pixels of normalised images ``(B, C, H, W)``, in their dtype and on their device."""
        return x * self.std.to(x) + self.mean.to(x)

    def to_input(self, pixels: Tensor) -> Tensor:
        """Return what the model takes for pixels ``(B, C, H, W)`` in [0, 1]."""
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)


def pixels_of(probe: Probe, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Pixels:
    """Return the normalisation of a probe's data: the values given here, else those of ``probe.about``.

    Raises:
        ValueError: neither is there, their lengths differ, or a standard deviation is not above 0.
    """
    mean = mean if mean is not None else probe.about.get("mean")
    std = std if std is not None else probe.about.get("std")
    if mean is None or std is None:
        raise ValueError(
            "Expected the normalisation of the data (images are changed in pixel space), received none: pass mean=... and "
            "std=..., or Probe(..., about={'mean': ..., 'std': ...}); mean=[0], std=[1] for images that are pixels already."
        )
    # two of (C, 1, 1)
    m, s = (torch.as_tensor(list(values), dtype=torch.float64)[:, None, None] for values in (mean, std))
    if m.shape != s.shape or not bool((s > 0).all()):
        raise ValueError(
            f"Expected one mean and one std above 0 for each channel, received {list(mean)} and {list(std)}."
        )
    return Pixels(m, s)
