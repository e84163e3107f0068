"""Neural collapse of features of labeled images: the four measures of Papyan, Han and Donoho (2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.depth_probes._classifiers import class_means, nearest_center

#: names of the measures in their order
NAMES = ("nc1", "nc2", "nc2_equinorm", "nc3", "nc4")

#: share of the squared norm of class means below which their differences are rounding of a pass in single precision
_ROUNDING = 1e-14


@dataclass(frozen=True)
class LabeledFeatures:
    """Features and classes on which neural collapse is measured.

    Attributes:
        x: (n, C) features.
        labels: (n,) classes.
        decisions: (n,) the network's own classes.
        head_input: (n, C') what the network's classifier takes at this tap; None where it takes nothing of it.
        weight: (K, C') of the classifier; None likewise.
    """

    x: Tensor
    labels: Tensor
    decisions: Tensor
    head_input: Tensor | None
    weight: Tensor | None

    def rows(self, index: Tensor) -> LabeledFeatures:
        """Return those of some of the images."""
        head_input = None if self.head_input is None else self.head_input[index]
        return LabeledFeatures(self.x[index], self.labels[index], self.decisions[index], head_input, self.weight)


def neural_collapse(data: LabeledFeatures) -> np.ndarray:
    """Return the measures in the order of `NAMES`; NaN where they are undefined.

    With the means m_c of K classes about their mean m, and the covariances S_W within classes and S_B = mean_c m_c m_c':

    - nc1: tr(S_W S_B^+) / K;
    - nc2: mean over pairs of classes of abs(cos(m_c, m_d) + 1 / (K - 1)); nc2_equinorm: standard deviation over mean of norms;
    - nc3: squared distance of the classifier's weights and the class means of what it takes, each of unit Frobenius norm;
    - nc4: share of images on which the network's decision is not the nearest class mean.

    Class means that do not differ beyond rounding, such as those of a class token before the first block, have none.
    """
    counts = data.labels.unique(return_counts=True)[1]
    if len(counts) < 2 or int(counts.min()) < 2 or not bool(torch.isfinite(data.x).all()):
        return np.full(len(NAMES), np.nan)
    classes, means = class_means(data.x, data.labels)
    duality = _duality(data)
    if not _differ(means):
        return np.array([np.nan, np.nan, np.nan, duality, np.nan])
    centered = means - means.mean(dim=0)
    nc2, equinorm = _simplex(centered)
    nearest = nearest_center(data.x, data.labels, data.x)
    mismatch = float((nearest != data.decisions).double().mean())
    return np.array([_variability(data, classes, means), nc2, equinorm, duality, mismatch])


def _differ(means: Tensor) -> bool:
    """Return whether class means ``(K, C)`` differ by more than rounding."""
    return bool((means - means.mean(dim=0)).square().sum() > _ROUNDING * means.square().sum())


def _variability(data: LabeledFeatures, classes: Tensor, means: Tensor) -> float:
    n_classes = len(classes)
    _, s, v = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
    # of K class means about their mean K - 1 directions are left
    above = s[: n_classes - 1] > s[0] * max(means.shape) * torch.finfo(s.dtype).eps
    if not bool(above.any()):
        return float("nan")
    s, v = s[: n_classes - 1][above], v[: n_classes - 1][above]
    within = (data.x - means[torch.searchsorted(classes, data.labels)]) @ v.T  # (n, r)
    # S_B has the eigenvalues s^2 / K
    return float((within.square().mean(dim=0) / s.square()).sum())


def _simplex(centered: Tensor) -> tuple[float, float]:
    n_classes, norms = len(centered), torch.linalg.norm(centered, dim=1)
    cosines = (centered @ centered.T) / torch.outer(norms, norms)
    upper = torch.triu_indices(n_classes, n_classes, 1)
    angles = (cosines[upper[0], upper[1]] + 1 / (n_classes - 1)).abs().mean()
    return float(angles), float(norms.std(correction=0) / norms.mean())


def _duality(data: LabeledFeatures) -> float:
    if data.head_input is None or data.weight is None:
        return float("nan")
    classes, means = class_means(data.head_input, data.labels)
    if not _differ(means):
        return float("nan")
    centered, weight = means - means.mean(dim=0), data.weight[classes]
    return float((weight / torch.linalg.norm(weight) - centered / torch.linalg.norm(centered)).square().sum())
