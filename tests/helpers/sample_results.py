"""Results of a few measures, made up from numbers."""

from __future__ import annotations

import numpy as np

from vitscope.core.objective_card import ObjectiveCard
from vitscope.diagnostics.hessian.hessian_eigenvalues import HessianEigenvaluesResult
from vitscope.diagnostics.landscape.loss_landscape import LossLandscapeResult
from vitscope.diagnostics.landscape.loss_slice import LossSliceResult
from vitscope.diagnostics.variance.feature_map_variance import FeatureMapVarianceResult

CARD = ObjectiveCard(loss="cross entropy, label smoothing 0", data="toy", n_images=8)


def eigenvalues(scale: float = 1.0) -> HessianEigenvaluesResult:
    values = scale * np.array([5.0, -2.0, 1.0])
    errors = 0.1 * abs(values)
    return HessianEigenvaluesResult(
        values, errors, errors, np.ones(3, dtype=bool), 0 * values, 30, np.zeros((0, 0)), (), CARD
    )


def variance(scale: float = 1.0) -> FeatureMapVarianceResult:
    values = scale * np.array([1.0, 3.0, 90.0, 2.0])
    return FeatureMapVarianceResult(
        taps=("stem", "a", "b", "c"),
        kinds=("stem", "msa", "mlp", "conv"),
        stages=np.array([0, 1, 1, 2]),
        depths=np.linspace(0, 1, 4),
        map_sizes=np.array([[8, 8], [8, 8], [8, 8], [4, 4]]),
        variance=values,
        variance_half_width=0.1 * values,
        log_variance_ratio=np.array([np.nan, 1.1, 3.4, np.nan]),
        log_variance_ratio_half_width=np.array([np.nan, 0.1, 0.2, np.nan]),
        level=0.95,
        n_images=8,
        card=CARD,
    )


def loss_slice(scale: float = 1.0) -> LossSliceResult:
    x = np.linspace(-1, 1, 5)
    by_direction = scale * np.stack([1 + 30 * x**2, 1 + 40 * x**2])
    nll = by_direction.mean(axis=0)
    return LossSliceResult(
        x, nll, 0.9 * nll, 1.1 * nll, 0 * x, 0 * x, 1 / (1 + nll), 0 * x, by_direction, 1 / (1 + by_direction),
        "random", "filter", np.ones(2), 0, CARD,
    )  # fmt: skip


def landscape(scale: float = 1.0) -> LossLandscapeResult:
    x = np.linspace(-1, 1, 3)
    nll = scale * (1 + x[:, None] ** 2 + 2 * x**2)
    return LossLandscapeResult(
        x, x, nll, 0.1 * nll, 0.1 * nll, 1 / (1 + nll), 0 * nll, "random", "filter", "", np.ones(2), 0.0, 3.0, 0, None,
        (), np.zeros((0, 2)), np.zeros(0), CARD,
    )  # fmt: skip
