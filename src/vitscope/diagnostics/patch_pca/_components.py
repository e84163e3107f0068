"""Principal components of feature vectors from the moments of groups of images, and colors and rotations of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from vitscope.linalg.feature_moments import FeatureMoments
from vitscope.runtime.distributed import gather_objects

#: components, one for each color
N_COMPONENTS = 3

#: quantiles of a component's scores that get the ends of the color range
COLOR_RANGE = (0.01, 0.99)


@dataclass(frozen=True)
class Components:
    """Principal components of feature vectors; NaN where the vectors do not vary or are not finite.

    Attributes:
        mean: (C,) of all vectors.
        axes: (n_components, C) of length 1; 0 for components beyond the channels.
        variance: (n_components,) along each axis, divisor n - 1.
        ratio: (n_components,) share of the variance of all channels.
        variance_without: (n_groups, n_components) without the images of a group.
        ratio_without: (n_groups, n_components) likewise.
        n_vectors: Number of vectors.
        reason: Why there are none; '' where there are.
    """

    mean: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    ratio: np.ndarray
    variance_without: np.ndarray
    ratio_without: np.ndarray
    n_vectors: int
    reason: str

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return the scores ``(n, h, w, n_components)`` of maps ``(n, C, h, w)``."""
        centered = features.astype(np.float64) - self.mean[:, None, None]
        return np.einsum("nchw,kc->nhwk", centered, self.axes)


def gathered_moments(groups: Sequence[FeatureMoments]) -> list[FeatureMoments]:
    """Return the moments of each group over all ranks, in the same order of additions on every rank."""
    totals = []
    for group in groups:
        group.merge_waiting()
        total = FeatureMoments()
        for n, mean, scatter, _, eps in gather_objects(group.state()):
            total.eps = max(total.eps, eps)
            if n:
                total.merge(n, torch.from_numpy(mean), torch.from_numpy(scatter))
        totals.append(total)
    return totals


def principal_components(groups: Sequence[FeatureMoments], n_channels: int) -> Components:
    """Return the first principal components of the vectors of all groups.

    The sign of an axis is that which makes its entry of the largest magnitude positive, as scikit-learn's. Without a group, the
    variances are those of the plane of the axes, to first order those of its own components.
    """
    total = FeatureMoments()
    for group in groups:
        if group.mean is not None and group.scatter is not None:
            total.merge(group.n, group.mean, group.scatter)
    eps = max(group.eps for group in groups)
    if total.n < 2 or total.mean is None or total.scatter is None:
        return _none(n_channels, len(groups), total.n, "fewer than two feature vectors")
    mean, scatter = total.mean.numpy(), total.scatter.numpy()
    spread = float(scatter.trace())
    if not np.isfinite(spread):
        return _none(n_channels, len(groups), total.n, "its activations are not finite")
    if spread <= eps**2 * (spread + total.n * float(mean @ mean)):
        return _none(n_channels, len(groups), total.n, "its features do not vary")
    values, vectors = torch.linalg.eigh(total.scatter)
    count = min(N_COMPONENTS, n_channels)
    axes = np.zeros((N_COMPONENTS, n_channels))
    axes[:count] = vectors.flip(1).T[:count].numpy()
    variance = np.zeros(N_COMPONENTS)
    variance[:count] = values.flip(0)[:count].clamp_min(0).numpy() / (total.n - 1)
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
    without = [_without(groups, skipped, axes) for skipped in groups]
    return Components(
        mean,
        axes,
        variance,
        variance * (total.n - 1) / spread,
        np.array([values for values, _ in without]),
        np.array([ratios for _, ratios in without]),
        total.n,
        "",
    )


def _without(
    groups: Sequence[FeatureMoments], skipped: FeatureMoments, axes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the variances along the best axes of the plane, and their shares of all variance, without one group."""
    others = [
        group for group in groups if group is not skipped and group.mean is not None and group.scatter is not None
    ]
    n = sum(group.n for group in others)
    if n < 2:
        return np.full(N_COMPONENTS, np.nan), np.full(N_COMPONENTS, np.nan)
    plane = torch.from_numpy(axes)
    mean = sum(
        (group.n / n * group.mean for group in others if group.mean is not None), torch.zeros(axes.shape[1]).double()
    )
    inside = torch.zeros(N_COMPONENTS, N_COMPONENTS, dtype=torch.float64)
    trace = 0.0
    for group in others:
        assert group.mean is not None
        assert group.scatter is not None
        offset = group.mean - mean
        inside += plane @ group.scatter @ plane.T + group.n * torch.outer(plane @ offset, plane @ offset)
        trace += float(group.scatter.trace() + group.n * offset @ offset)
    values = torch.linalg.eigvalsh(inside).flip(0).clamp_min(0).numpy()
    return values / (n - 1), values / trace if trace > 0 else np.full(N_COMPONENTS, np.nan)


def _none(n_channels: int, n_groups: int, n_vectors: int, reason: str) -> Components:
    null = np.full(N_COMPONENTS, np.nan)
    rows = np.full((n_groups, N_COMPONENTS), np.nan)
    axes = np.full((N_COMPONENTS, n_channels), np.nan)
    return Components(np.full(n_channels, np.nan), axes, null, null, rows, rows, n_vectors, reason)


def colors_of(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return colors in [0, 1] of scores ``(n, h, w, n_components)``, 0 outside of the mask ``(n, h, w)``.

    Each component's 1 % and 99 % quantiles over the shown images become 0 and 1; one without a range is 0.5; NaN passes through.
    """
    if not mask.any() or not np.isfinite(scores).all():
        return np.full(scores.shape, np.nan)
    low, high = np.quantile(scores[mask], COLOR_RANGE, axis=0)
    width = np.where(high > low, high - low, 1.0)
    colors = np.where(high > low, np.clip((scores - low) / width, 0, 1), 0.5)
    return np.where(mask[..., None], colors, 0.0)


def rotation_to(
    scores: np.ndarray, mask: np.ndarray, reference: np.ndarray, reference_mask: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the orthogonal matrix that brings scores nearest to reference scores of the same images, and how near.

    Grids of different sizes are compared on the smaller one by averages over areas, where both masks hold.

    Args:
        scores: (n, h, w, n_components).
        mask: (n, h, w).
        reference: (n, h', w', n_components).
        reference_mask: (n, h', w').

    Returns:
        (n_components, n_components), and the squared Procrustes correlation, 1 where scores are a rotated and scaled copy.
    """
    grid = (min(scores.shape[1], reference.shape[1]), min(scores.shape[2], reference.shape[2]))
    inside = (_pooled(mask[..., None].astype(float), grid) > 0.5) & (
        _pooled(reference_mask[..., None].astype(float), grid) > 0.5
    )
    one, other = (_pooled(values, grid)[inside[..., 0]] for values in (scores, reference))
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    size = np.square(one).sum() * np.square(other).sum()
    if not (np.isfinite(size) and size > 0):
        return np.full((N_COMPONENTS, N_COMPONENTS), np.nan), np.nan
    left_vectors, values, right_vectors = np.linalg.svd(one.T @ other)
    return left_vectors @ right_vectors, float(values.sum() ** 2 / size)


def _pooled(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return scores ``(n, h, w, components)`` averaged over the cells of a smaller grid."""
    maps = torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2)  # (n, components, h, w)
    return adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1).numpy()  # (n, *grid, components)
