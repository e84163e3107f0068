"""Overlap of attention maps as intersection over union of the positions that hold most of their mass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mass_masks(maps: Tensor, mass: float) -> Tensor:
    """Return the fewest positions that hold a share ``mass`` of each map (..., h, w), as True; of equal values the first.

    A map without mass, or that is not finite, has none.
    """
    values, order = maps.flatten(-2).sort(dim=-1, descending=True, stable=True)  # (..., h * w)
    before = values.cumsum(-1) - values
    # of an even map the sum reaches the share but for rounding
    is_needed = before < mass * values.sum(-1, keepdim=True) * (1 - 1e-9)
    masks = torch.zeros_like(is_needed).scatter(-1, order, is_needed)
    return masks.reshape(maps.shape)


def overlaps(masks: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of each pair of masks (B, n, h, w) and (B, m, h, w): (B, n, m); NaN of two empty."""
    one, two = (side.flatten(2).double() for side in (masks, others))  # (B, n, h * w)
    both = one @ two.transpose(1, 2)  # (B, n, m)
    union = one.sum(-1)[:, :, None] + two.sum(-1)[:, None, :] - both
    return torch.where(union > 0, both / union, torch.nan)


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
