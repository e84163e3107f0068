"""Classifiers, neural collapse and intrinsic dimension of features against scikit-learn, definitions and known manifolds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from tests.fixtures.images.labeled_clusters import clusters
from vitscope.diagnostics.depth_probes._classifiers import (
    PENALTIES,
    TEMPERATURE,
    nearest_center,
    nearest_neighbors,
    ridge,
    ridge_regression,
)
from vitscope.diagnostics.depth_probes._intrinsic_dimension import intrinsic_dimension
from vitscope.diagnostics.depth_probes._neural_collapse import LabeledFeatures, neural_collapse
from vitscope.stats.jackknife import group_numbers, jackknife_half_width

# ---- classifiers


@pytest.mark.parametrize("width", [6, 90])  # fewer and more features than training images
def test_ridge_equals_scikit_learn(width: int) -> None:
    (x, y), (z, _) = clusters(60, width, 1, spread=2.0), clusters(40, width, 2, spread=2.0)
    coefficients, intercept, penalty = ridge_regression(x, y)
    peer = Ridge(alpha=penalty).fit(x.numpy(), np.eye(4)[y])
    np.testing.assert_allclose(x @ coefficients + intercept, peer.predict(x.numpy()), atol=1e-9)
    np.testing.assert_array_equal(ridge(x, y, z), RidgeClassifier(alpha=penalty).fit(x, y).predict(z))
    squares = np.square(np.linalg.svd(x - x.mean(0), compute_uv=False)).sum() / min(x.shape)
    peer_cv = RidgeClassifierCV(alphas=[p * squares for p in PENALTIES]).fit(x.numpy(), y.numpy())
    assert peer_cv.alpha_ == pytest.approx(penalty)


def test_nearest_neighbors_and_centers_equal_scikit_learn() -> None:
    (x, y), (z, _) = clusters(60, 6, 1, spread=2.0), clusters(40, 6, 2, spread=2.0)
    peer = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE)).fit(x, y)
    np.testing.assert_array_equal(nearest_neighbors(7)(x, y, z), peer.predict(z))
    np.testing.assert_array_equal(nearest_center(x, y, z), NearestCentroid().fit(x, y).predict(z))


# ---- neural collapse


def labeled(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> LabeledFeatures:
    return LabeledFeatures(x, y, y, x if weight is not None else None, weight)


def test_a_simplex_is_collapsed() -> None:
    n_classes = 5
    simplex = torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes
    y = torch.arange(50) % n_classes
    found = neural_collapse(labeled(2 * simplex[y] + 3.0, y, weight=7 * simplex))
    np.testing.assert_allclose(found, np.zeros(5), atol=1e-12)
    wrong = LabeledFeatures(simplex[y], y, (y + 1) % n_classes, None, None)
    assert neural_collapse(wrong)[4] == 1.0
    assert np.isnan(neural_collapse(wrong)[3])


def test_the_within_class_variability_is_its_definition() -> None:
    x, y = clusters(80, 7, 1)
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    within = x.numpy() - means[y]
    centered = means - means.mean(0)
    s_w, s_b = within.T @ within / len(x), centered.T @ centered / 4
    found = neural_collapse(labeled(x, y))
    assert found[0] == pytest.approx(np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-10)) / 4, rel=1e-9)
    cosines = [
        centered[a] @ centered[b] / np.linalg.norm(centered[a]) / np.linalg.norm(centered[b])
        for a in range(4) for b in range(a)
    ]  # fmt: skip
    assert found[1] == pytest.approx(np.mean(np.abs(np.add(cosines, 1 / 3))), rel=1e-9)
    assert found[2] == pytest.approx(
        np.std(np.linalg.norm(centered, axis=1)) / np.mean(np.linalg.norm(centered, axis=1))
    )


def test_a_class_of_one_image_has_no_variability() -> None:
    x, y = clusters(20, 3, 1)
    y[0] = 9
    assert np.isnan(neural_collapse(labeled(x, y))).all()


def test_class_means_that_differ_by_rounding_have_no_collapse() -> None:
    x, y = clusters(80, 7, 1)
    same = torch.full(
        (len(x), 3), 0.1, dtype=torch.float64
    )  # means of 0.1 over different numbers of images differ by rounding
    weight = torch.eye(4, 3, dtype=torch.float64)
    values = neural_collapse(LabeledFeatures(x, y, y, same, weight))
    assert np.isnan(values[3])
    assert np.isfinite(values[[0, 1, 2, 4]]).all()
    flat = neural_collapse(LabeledFeatures(same, y, y, x[:, :3], weight))
    assert np.isfinite(flat[3])
    assert np.isnan(flat[[0, 1, 2, 4]]).all()


# ---- intrinsic dimension


@pytest.mark.parametrize("dimension", [2, 5])
def test_the_intrinsic_dimension_of_a_sphere_in_many_dimensions(dimension: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1500, dimension + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    embedded = np.concatenate([points, points**2], axis=1) @ rng.normal(size=(2 * dimension + 2, 30))
    # the estimate has a relative standard error of (1500 * 0.9)^(-1/2) = 0.027, more as neighbors share distances; curvature adds
    assert intrinsic_dimension(torch.from_numpy(embedded))[0] == pytest.approx(dimension, rel=0.12)


def test_the_intrinsic_dimension_is_its_formula() -> None:
    points = np.random.default_rng(0).normal(size=(60, 4))
    points[1] = points[0]  # counts once
    distance = np.sort(np.linalg.norm(points[1:, None] - points[None, 1:], axis=2), axis=1)[:, 1:3]
    ratios = np.sort(np.log(distance[:, 1] / distance[:, 0]))
    m = int(0.9 * len(ratios))
    expected = (m - 1) / (ratios[:m].sum() + (len(ratios) - m) * ratios[m - 1])
    assert intrinsic_dimension(torch.from_numpy(points))[0] == pytest.approx(expected, rel=1e-9)


def test_equal_images_count_once_for_the_intrinsic_dimension() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 3)))
    repeated = torch.cat([x, x[:200], x[:100]])[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    assert intrinsic_dimension(repeated) == pytest.approx(intrinsic_dimension(x), rel=1e-12)
    assert np.isnan(intrinsic_dimension(x[:3].repeat(100, 1))).all()


@pytest.mark.slow
def test_intervals_are_calibrated() -> None:
    """The stated variance is that of the estimate over samples of images, on average."""
    numbers: dict[str, list[float]] = {"dimension": [], "nc1": []}
    squares: dict[str, list[float]] = {"dimension": [], "nc1": []}
    groups, quantile = group_numbers(200), 2.262  # of Student with 9 degrees of freedom
    rest = [torch.from_numpy(np.flatnonzero(groups != g)) for g in range(10)]
    for seed in range(100):
        x, _ = clusters(200, 5, seed + 1)
        dimension, error = intrinsic_dimension(x)
        data = labeled(*clusters(200, 5, seed + 1, spread=0.5))  # classes far apart: nc1 has no heavy tail
        left_out = np.array([neural_collapse(data.rows(index))[0] for index in rest])
        numbers["dimension"].append(dimension)
        squares["dimension"].append(error**2)
        numbers["nc1"].append(neural_collapse(data)[0])
        squares["nc1"].append((float(jackknife_half_width(left_out)) / quantile) ** 2)
    for name, values in numbers.items():
        # the ratio of variances from 100 samples of each has a standard deviation of about 0.15
        assert 0.6 < np.mean(squares[name]) / np.var(values, ddof=1) < 1.6, name
