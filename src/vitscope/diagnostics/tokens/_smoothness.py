"""Similarity of the tokens of an image: mean pairwise cosine, and distance from a matrix of equal tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vitscope.core.shared_values.feature_squares import channel_sums, flat_map, token_squares

#: squared residual below this share of the squared norm: single precision sums cancel, so it is computed again in double
_CANCELLED = 1e-2


def mean_cosine(x: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of different tokens of each image of ``x (B, C, h, w)``: ``(B,)`` in float64.

    With the unit vectors u of the m tokens that are not zero, ``(|sum u|^2 - m) / (m (m - 1))``: exact, in O(n C). NaN where
    fewer than two tokens have a direction.
    """
    norms = token_squares(x).sqrt()  # (B, n)
    has_direction = norms != 0
    inverse = torch.where(has_direction, 1 / norms, 0.0)
    total = (flat_map(x) * inverse[:, None]).sum(2).double()  # (B, C)
    m = has_direction.sum(1).double()
    return torch.where(m > 1, (total.square().sum(1) - m) / (m * (m - 1)), torch.nan)


def rank1_residual(x: Tensor, norm: str) -> Tensor:
    """Return ``|X - 1 m'| / |X|`` with the mean token m of each image of ``x (B, C, h, w)``: ``(B,)`` in float64.

    Args:
        x: Tokens of each image, one a position.
        norm: ``frobenius``, of which the mean is the minimizer; or ``composite``, ``sqrt(|X|_1 |X|_inf)`` of the largest sums of
            magnitudes over tokens and over channels.
    """
    flat = flat_map(x)  # (B, C, n)
    n = flat.shape[2]
    sums = channel_sums(x)  # (B, C)
    if norm == "composite":
        residual = flat - (sums / n).to(flat.dtype)[..., None]
        return _composite(residual) / _composite(flat)
    total = token_squares(x).sum(1, dtype=torch.float64)
    squares = total - sums.square().sum(1) / n
    cancelled = (squares < _CANCELLED * total).nonzero()[:, 0]
    if len(cancelled):
        tokens = flat[cancelled].double()
        squares[cancelled] = (tokens - tokens.mean(2, keepdim=True)).square().sum((1, 2))
    return (squares / total).sqrt()


def _composite(x: Tensor) -> Tensor:
    magnitudes = x.abs()
    return (magnitudes.sum(2).amax(1).double() * magnitudes.sum(1).amax(1).double()).sqrt()
