"""Intrinsic dimension of features from the distances to the two nearest neighbors (TwoNN, Facco et al. 2017)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

#: share of the largest ratios of distances that count as lower bounds alone, as they lie where the density changes
DISCARD = 0.1

#: neighbors whose distances are computed again without cancellation
_CANDIDATES = 6

#: squared distances below this share of the squared norm are rounding of float32
_ROUNDING = 1e-13

_CHUNK = 1024


def intrinsic_dimension(x: Tensor) -> tuple[float, float]:
    """Return the intrinsic dimension of features ``(n, C)`` in float64 and its standard error; NaN with fewer than three ratios.

    With the ratios r of the second to the first distance of n images in ascending order, of which m = 0.9 n are taken at
    their value and the others as at least the m-th: ``d = (m - 1) / T, T = sum_(i <= m) ln r_i + (n - m) ln r_m``, the unbiased
    estimate from a Pareto distribution. Equal images count once; those with a duplicate up to rounding are left out.

    Images that share neighbors have dependent ratios. The variance is the sum of ``z_i z_j`` over the pairs that share an image
    among themselves and their two neighbors, ``z_i = (1[i <= m] - d min(ln r_i, ln r_m)) / T`` the influence of image i.
    """
    # an image beside two equal ones would have the ratio 1
    x = x[torch.from_numpy(np.sort(np.unique(x.numpy(), axis=0, return_index=True)[1]))]
    if len(x) < 4:
        return float("nan"), float("nan")
    neighbors, squares = _nearest(x)  # (n, 2) both
    least = _ROUNDING * float((x - x.mean(dim=0)).square().sum(dim=1).mean())
    rows = np.flatnonzero(squares[:, 0] > least)
    ratios = np.log(squares[rows, 1] / squares[rows, 0]) / 2
    n_taken = int(np.floor(len(ratios) * (1 - DISCARD)))
    if n_taken < 3 or not np.isfinite(ratios).all():
        return float("nan"), float("nan")
    largest = np.sort(ratios)[n_taken - 1]
    bounded = np.minimum(ratios, largest)
    total = bounded.sum()
    if not total > 0:
        return float("nan"), float("nan")
    dimension = (n_taken - 1) / total
    influence = ((ratios <= largest) - dimension * bounded) / total
    members = np.concatenate([rows[:, None], neighbors[rows]], axis=1)  # (m, 3) the image and its neighbors
    shape = (len(rows), len(x))
    marks = sparse.csr_array((np.ones(members.size), members.ravel(), np.arange(0, members.size + 1, 3)), shape)
    dependent = (marks @ marks.T).astype(bool)
    variance = float(influence @ (dependent @ influence))
    return float(dimension), float(np.sqrt(max(variance, np.square(influence).sum())))


def _nearest(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the two nearest others of each image, nearest first, and their squared distances, ``(n, 2)`` both."""
    x = x - x.mean(dim=0)
    n_candidates = min(_CANDIDATES, len(x) - 1)
    indices, squares = [], []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        rounded = x.square().sum(dim=1) - 2 * part @ x.T  # less the norm of the image itself
        rounded[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        candidates = rounded.topk(n_candidates, dim=1, largest=False).indices
        exact = (x[candidates] - part[:, None]).square().sum(dim=2)  # (B, n_candidates)
        order = exact.argsort(dim=1)[:, :2]
        indices.append(candidates.gather(1, order))
        squares.append(exact.gather(1, order))
    return torch.cat(indices).numpy(), torch.cat(squares).numpy()
