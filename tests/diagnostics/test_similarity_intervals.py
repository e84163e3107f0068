"""What similarities are without groups of images, and their nulls, image by image in NumPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import vitscope as vs
from tests.diagnostics.test_cka import normal, probe_of
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.cka._batch_hsic import BatchHsic
from vitscope.diagnostics.cka._comparisons import PENALTIES, RSA, LinearRegression, MutualKNN, Pair, Procrustes
from vitscope.diagnostics.cka._hsic import gram, hsic
from vitscope.diagnostics.cka._representations import Representation

N = 23
GROUPS = np.arange(N) % 5
A = np.random.default_rng(0).normal(size=(N, 4)) + 0.5
B = A @ np.random.default_rng(1).normal(size=(4, 6)) + np.random.default_rng(2).normal(size=(N, 6))


def pair_of(*sides: np.ndarray) -> Pair:
    """Return the pair of two representations, or of the same two twice."""
    made = [Representation(torch.from_numpy(x), torch.from_numpy(x - x.mean(axis=1, keepdims=True))) for x in sides]
    return Pair(made[:1], made[1:], within=False)


def test_procrustes_without_a_group_keeps_the_rotation_of_all_images() -> None:
    x, y = (part - part.mean(axis=0) for part in (A, B))
    u, _, v = np.linalg.svd(x.T @ y, full_matrices=False)
    products = np.array([row @ (u @ v) @ other for row, other in zip(x, y)])
    found = Procrustes().without_groups(pair_of(A, B), GROUPS)[:, 0, 0]
    for group in range(5):
        rest = group != GROUPS
        lengths = np.sqrt(np.square(x[rest]).sum() * np.square(y[rest]).sum())
        assert found[group] == pytest.approx(products[rest].sum() / lengths, rel=1e-12)


def test_linear_regression_without_a_group_keeps_the_penalty_of_all_images() -> None:
    x, y = (part - part.mean(axis=0) for part in (A, B))
    mean_square = np.square(np.linalg.svd(x, compute_uv=False)).mean()
    errors = []
    for penalty in PENALTIES:
        rows = []
        for i in range(N):
            others = np.delete(np.arange(N), i)
            design = np.column_stack([np.ones(N - 1), x[others]])
            bend = penalty * mean_square * np.diag([0.0, *np.ones(x.shape[1])])
            coefficients = np.linalg.solve(design.T @ design + bend, design.T @ y[others])
            rows.append(np.square(y[i] - np.append(1.0, x[i]) @ coefficients).sum())
        errors.append(rows)
    best = np.array(errors)[np.argmin(np.sum(errors, axis=1))]
    spread = np.array([np.square(y[i] - np.delete(y, i, 0).mean(axis=0)).sum() for i in range(N)])
    found = LinearRegression().without_groups(pair_of(A, B), GROUPS)[:, 0, 0]
    for group in range(5):
        rest = group != GROUPS
        assert found[group] == pytest.approx(1 - best[rest].sum() / spread[rest].sum(), rel=1e-9)


@pytest.mark.parametrize("comparison", [MutualKNN(3), RSA()])
def test_neighbors_and_ranks_without_a_group_are_those_of_the_other_images(comparison: MutualKNN | RSA) -> None:
    found = comparison.without_groups(pair_of(A, B), GROUPS)
    for group in range(5):
        rest = pair_of(A[group != GROUPS], B[group != GROUPS])
        alone = comparison.similarities(rest, [torch.arange(int((group != GROUPS).sum()))])[0]
        np.testing.assert_allclose(found[group], alone, rtol=1e-12)


def test_cka_of_unequal_batches_has_the_jackknife_and_the_nulls_of_its_batches() -> None:
    x, z = normal(150, 3, 1, 1), normal(150, 3, 1, 1, seed=1)
    sizes, n_permutations = [60, 60, 30], 4
    probe = probe_of(60, x=x, z=z + x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        found = vs.similarity(probe, measure="cka", n_permutations=n_permutations, seed=3)
    values, nulls = [], []
    for number, (a, b) in enumerate(zip(x.split(sizes), (z + x).split(sizes))):
        grams = torch.stack([gram(a), gram(b)])
        values.append(len(a) * hsic(grams, grams).numpy())
        orders = [np.random.default_rng([3, number, draw]).permutation(len(a)) for draw in range(n_permutations)]
        permuted = [torch.stack([gram(a[order]), gram(b[order])]) for order in orders]
        nulls.append([len(a) * hsic(grams, other).numpy() for other in permuted])
    total = np.sum(values, axis=0)

    def ratio(part: np.ndarray, scale: np.ndarray) -> float:
        return part[0, 1] / np.sqrt(scale[0, 0] * scale[1, 1])

    assert found.similarity[0, 1] == pytest.approx(ratio(total, total), rel=1e-9)
    left_out = [ratio(total - value, total - value) for value in values]
    error = np.sqrt(2 / 3 * np.square(left_out - np.mean(left_out)).sum())
    assert found.half_widths[0, 0, 1] == pytest.approx(stats.t.ppf(0.975, 2) * error, rel=1e-9)
    draws = [ratio(part, total) for part in np.sum(nulls, axis=0)]
    assert found.null_means[0, 0, 1] == pytest.approx(np.mean(draws), rel=1e-9)


def test_a_null_equal_to_the_measured_value_counts_as_at_least_it() -> None:
    """Of three images of each of two kinds an order in ten keeps the kinds apart, and reaches the value."""
    features = torch.zeros(6, 3, dtype=torch.float64)
    features[3:] = 1.0
    sums = BatchHsic(1, False, 100, 0)
    sums.add(0, [gram(features)])
    value, _, nulls = sums.result()
    assert value[0, 0] == pytest.approx(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        found = vs.similarity(probe_of(6, x=features[:, :, None, None]), measure="cka", n_permutations=100)
    expected = (1 + (nulls[:, 0, 0] > 1 - 1e-6).sum()) / 101
    assert 3 / 101 < expected < 25 / 101
    assert found.p_values[0, 0, 0] == pytest.approx(expected)
