"""Overlap of attention maps as intersection over union of the positions that hold most of their mass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mass_masks(maps: Tensor, mass: float) -> Tensor:
    """Return the fewest positions that hold a share ``mass`` of each map (..., h, w), as True; of equal values the first.

    A map without mass, or that is not finite, has none.
    """
    values = maps.flatten(-2)  # (..., h * w)
    descending = _descending(values)
    before = descending.cumsum(-1) - descending
    # of an even map the sum reaches the share but for rounding
    n_needed = (before < mass * values.sum(-1, keepdim=True) * (1 - 1e-9)).sum(-1, keepdim=True)
    least = descending.gather(-1, (n_needed - 1).clamp_min(0))  # the smallest value that is needed
    is_above, is_equal = values > least, values == least
    is_among_first = is_equal.cumsum(-1) <= n_needed - is_above.sum(-1, keepdim=True)
    return (is_above | (is_equal & is_among_first)).reshape(maps.shape)


def masks_of_layers(maps: Sequence[Tensor], mass: float) -> list[Tensor]:
    """Return `mass_masks` of each layer's maps (B, heads, h, w), of all layers with the same shape at once."""
    masks: dict[int, Tensor] = {}
    for shape in {layer.shape for layer in maps}:
        places = [place for place, layer in enumerate(maps) if layer.shape == shape]
        masks |= dict(zip(places, mass_masks(torch.stack([maps[place] for place in places]), mass)))
    return [masks[place] for place in range(len(maps))]


def _descending(values: Tensor) -> Tensor:
    """Return values (..., n) in descending order; one that is not a number comes first."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    # NumPy sorts float64 in a twentieth of the time of torch, which finds the order too
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1)).flip(-1)


def overlaps(masks: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of each pair of masks (B, n, h, w) and (B, m, h, w): (B, n, m); NaN of two empty."""
    one, two = (side.flatten(2).double() for side in (masks, others))  # (B, n, h * w)
    both = one @ two.transpose(1, 2)  # (B, n, m)
    union = one.sum(-1)[:, :, None] + two.sum(-1)[:, None, :] - both
    return torch.where(union > 0, both / union, torch.nan)


def where_finite(overlap: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return overlaps (B, n, m), NaN for pairs of which a map is not finite: its mask is empty for want of numbers.

    Args:
        overlap: Intersections over unions of the maps' masks.
        one: (B, n) whether each map is finite.
        other: (B, m) the same of the second side.
    """
    return torch.where(one[:, :, None] & other[:, None, :], overlap, torch.nan)


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (B, n, h, w) on a grid of another size: each position takes the mask's value at its center."""
    return F.interpolate(masks.double(), size=size, mode="nearest-exact") > 0.5


def covered(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks of pixels (B, H, W) on a grid (B, 1, h, w): True where at least half of a position's pixels are."""
    return F.adaptive_avg_pool2d(masks[:, None].double(), size) >= 0.5


def mean_of_pairs(overlap: Tensor) -> Tensor:
    """Return the mean (B,) of (B, n, n) over pairs of different ones; NaN of a single one."""
    n = overlap.shape[1]
    others = ~torch.eye(n, dtype=torch.bool, device=overlap.device)
    return overlap[:, others].mean(dim=1) if n > 1 else overlap.new_full((len(overlap),), torch.nan)
