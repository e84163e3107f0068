"""Outliers and their parts against dense Gauss-Newton matrices in float64, and counts of constructed spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import dense_hessian, logit_jacobian, make
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.diagnostics.class_structure import _class_gradients
from vitscope.diagnostics.class_structure._outlier_count import count_outliers, largest_countable, matched_number
from vitscope.runtime import distributed


def dense_parts(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """Return G and its parts from the Jacobian of the logits, by the definition."""
    jacobian = logit_jacobian(model, x).numpy()  # (n, C, size)
    p = model(x).softmax(1).detach().numpy()
    n, n_classes = p.shape
    labels = y.numpy() if y.ndim == 1 else y.argmax(1).numpy()
    vectors = np.einsum("icp,idc->idp", jacobian, p[:, None] - np.eye(n_classes))  # (n, c', size)
    weights = p / n
    size = vectors.shape[2]
    parts = {name: np.zeros((size, size)) for name in ("class", "cross_class", "same_class", "within")}
    for c in range(n_classes):
        means, masses = np.zeros((n_classes, size)), np.zeros(n_classes)
        for d in range(n_classes):
            w, v = weights[labels == c, d], vectors[labels == c, d]
            masses[d], means[d] = w.sum(), w @ v / w.sum()
            parts["within"] += np.einsum("i,ip,iq->pq", w, v - means[d], v - means[d])
        others = [d for d in range(n_classes) if d != c]
        mean = masses[others] @ means[others] / masses[others].sum()
        parts["class"] += masses[others].sum() * np.outer(mean, mean)
        parts["same_class"] += masses[c] * np.outer(means[c], means[c])
        for d in others:
            parts["cross_class"] += masses[d] * np.outer(means[d] - mean, means[d] - mean)
    gauss_newton = np.einsum("id,idp,idq->pq", weights, vectors, vectors)
    np.testing.assert_allclose(sum(parts.values()), gauss_newton, atol=1e-12)
    return {"all": gauss_newton, **parts}


@pytest.mark.parametrize(("kind", "soft"), [("conv", False), pytest.param("transformer", True, marks=pytest.mark.slow)])
def test_parts_are_those_of_dense_matrices(kind: str, soft: bool) -> None:
    """Eigenvectors are exact to the root of the tolerance on values; traces to rounding, `within` to 4 standard errors."""
    model, x, y = make(kind, n=24, soft=soft)
    objective = vs.Objective(weight_decay=0.05)
    dense = dense_hessian(model, x, y, objective)
    parts = dense_parts(model, x, y)
    probe = vs.Probe(model, [(x[:9], y[:9]), (x[9:], y[9:])], objective)
    result = vs.hessian_class_structure(probe, k=12, tol=1e-9, n_splits=0, n_vectors=20)
    values, vectors = np.linalg.eigh(dense)
    values, vectors = values[::-1][:12], vectors[:, ::-1][:, :12]
    np.testing.assert_allclose(result.eigenvalues, values, atol=1e-10)
    np.testing.assert_allclose(result.l2, 0.05, atol=1e-14)
    for name, row in zip(result.parts, result.part_values):
        np.testing.assert_allclose(row, np.einsum("pk,pq,qk->k", vectors, parts[name], vectors), atol=1e-6)
    np.testing.assert_allclose(result.part_values.sum(0), result.gauss_newton, atol=1e-14)
    np.testing.assert_allclose(result.gauss_newton + result.remainder + result.l2, result.eigenvalues, atol=1e-14)
    np.testing.assert_allclose(result.ggn_eigenvalues, np.linalg.eigvalsh(parts["all"])[::-1][:12], atol=1e-10)
    np.testing.assert_allclose(result.class_eigenvalues, np.linalg.eigvalsh(parts["class"])[::-1][:3], atol=1e-14)
    exact = [np.trace(parts[name]) for name in result.parts]
    np.testing.assert_allclose(result.part_traces[:3], exact[:3], rtol=1e-12)
    assert abs(result.part_traces[3] - exact[3]) < 4 * result.within_standard_error
    np.testing.assert_allclose(result.part_shares, result.part_traces / result.part_traces.sum())
    named = dict(model.named_parameters())
    gradient = torch.autograd.grad(objective(model, x, y), list(named.values()))
    flat = torch.cat([g.reshape(-1) for g in gradient]).numpy()
    overlap = np.cumsum((vectors.T @ flat) ** 2) / (flat @ flat)
    np.testing.assert_allclose(result.gradient_overlap, overlap, atol=1e-6)
    assert (result.verdict, result.n_classes, result.n_classes_present) == ("undecided", 3, 3)


def test_classes_in_several_passes_give_the_same_numbers() -> None:
    model, x, y = make("conv", n=24)
    probe = vs.Probe(model, [(x[:9], y[:9]), (x[9:], y[9:])])
    size = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {"k": 3, "n_splits": 0, "n_vectors": 2, "parameters": "head*"}
    whole = vs.hessian_class_structure(probe, **options)
    parts = vs.hessian_class_structure(probe, **options, micro_batch=4, max_memory=40 * 8 * size)
    one = vs.hessian_class_structure(vs.Probe(model, [(x, y)]), **options)
    for other in (parts, one):
        np.testing.assert_allclose(other.part_values, whole.part_values, atol=1e-9)
        np.testing.assert_allclose(other.part_traces, whole.part_traces, atol=1e-12)


def linear_probe(n_classes: int, directions: str, n: int = 1000, scale: float = 6.0) -> vs.Probe:
    """Return a linear softmax network with nearly equal probabilities, whose G is the mean of ``(diag p - p p^T) x x^T``.

    With equal probabilities the eigenvalues are 1/C times those of the images' second moment, C - 1 times each: one large
    direction of the images gives C - 1 outliers, C large directions give C (C - 1).
    """
    generator = torch.Generator().manual_seed(0)
    width = 40
    y = torch.arange(n) % n_classes
    means = torch.eye(width, dtype=torch.float64)[:n_classes] * scale
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    x += means[y] if directions == "class" else means[0] * 0.6
    model = nn.Linear(width, n_classes, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(n_classes, width, generator=generator, dtype=torch.float64))
    return vs.Probe(model, [(x, y)])


@pytest.mark.parametrize(
    ("n_classes", "directions", "k", "count", "verdict"),
    [
        (5, "one", 20, 4, "C - 1"),
        pytest.param(5, "class", 40, 20, "C (C - 1)", marks=pytest.mark.slow),
    ],
)
def test_counts_of_a_constructed_gauss_newton_matrix(
    n_classes: int, directions: str, k: int, count: int, verdict: str
) -> None:
    result = vs.hessian_class_structure(linear_probe(n_classes, directions), k=k, n_vectors=2, tol=1e-6)
    assert (result.n_outliers, result.ggn_n_outliers) == (count, count)
    assert (result.verdict, result.verdict_reason) == (verdict, "")
    assert result.n_outliers_of_splits.tolist() == [count, count]
    assert result.gap_p_value < 0.01
    # a linear network has no curvature of its own
    np.testing.assert_allclose(result.remainder, 0, atol=1e-12)
    means = result.part_values[:3].sum(0) / result.gauss_newton
    if directions == "class":
        # second moment along a class's direction: 36 / C of the means and 1 of the noise, whose means over 200 images are small
        np.testing.assert_allclose(means[:count], 36 / 5 / (36 / 5 + 1), rtol=0.05)
        assert (means[count:] < 0.1).all()


def test_a_shift_by_weight_decay_changes_no_count() -> None:
    probe = linear_probe(5, "one")
    decayed = vs.Probe(probe.model, probe.batches, vs.Objective(weight_decay=10.0))
    result = vs.hessian_class_structure(decayed, k=20, n_vectors=2, tol=1e-6)
    assert (result.n_outliers, result.verdict) == (4, "C - 1")
    np.testing.assert_allclose(result.l2, 10.0)


@pytest.mark.parametrize("kind", ["semicircle", "exponential"])
def test_a_bulk_alone_has_no_decided_count(kind: str) -> None:
    """Of a random matrix none of 40 has outliers; three sets of independent exponential values agree in at most 3 % of 200 cases.

    The share was 0.6 % of 1000: more than 6 of 200 have a probability of 1e-3.
    """
    rng = np.random.default_rng(0)

    def count() -> int:
        if kind == "exponential":
            return count_outliers(np.sort(rng.exponential(size=20_000))[-30:]).count
        a = rng.standard_normal((200, 200))
        return count_outliers(np.linalg.eigvalsh(a + a.T)[-30:]).count

    if kind == "semicircle":
        assert sum(count() > 0 for _ in range(40)) == 0
    else:
        triples = [(count(), count(), count()) for _ in range(200)]
        assert sum(a == b == c > 0 for a, b, c in triples) <= 6


def test_counts_of_given_values() -> None:
    bulk = np.linspace(1, 0.5, 20)
    assert count_outliers(np.r_[9.0, 8, 7, bulk]).count == 3
    assert count_outliers(np.r_[9.0, 8, 7, bulk]).gap_ratio == pytest.approx(7)
    assert count_outliers(bulk).count == 0
    assert count_outliers(np.r_[bulk[:4], 100.0]).count == 0  # too few
    assert count_outliers(np.array([-1.0, 0.0])).count == 0
    assert count_outliers(np.ones(30)).count == 0
    assert (largest_countable(30), largest_countable(5)) == (21, 0)
    assert [matched_number(n, 10) for n in (9, 10, 90, 100, 11)] == ["C - 1", "C", "C (C - 1)", "C^2", "none"]


@pytest.mark.parametrize(("gap", "count"), [(1.0, 1), (0.85, 1), (0.8, 0)])
def test_the_probability_of_a_gap_counts_all_places_tried(gap: float, count: int) -> None:
    """Of 13 gaps 5 have the 8 of a bulk below them; the first is ``10 gap`` times the mean of the 12 that follow."""
    values = np.exp(-np.cumsum([0.0, gap, *[0.1] * 12]))
    found = count_outliers(values)
    p_value = 5 * (1 + 10 * gap / 12) ** -12
    assert (p_value <= 0.01) == (count == 1)
    assert found.count == count
    if count:
        assert found.p_value == pytest.approx(p_value, rel=1e-9)
        assert found.gap_ratio == pytest.approx(np.exp(gap), rel=1e-12)


def test_a_bulk_of_exponential_gaps_seldom_has_an_outlier() -> None:
    rng = np.random.default_rng(0)
    counts = [count_outliers(np.exp(-np.cumsum(rng.exponential(size=29)))).count for _ in range(2000)]
    assert np.mean(np.array(counts) > 0) < 0.01 + 4 * np.sqrt(0.01 * 0.99 / 2000)


def test_reasons_of_an_undecided_count() -> None:
    probe = linear_probe(5, "one", n=200)
    few = vs.hessian_class_structure(probe, k=8, n_vectors=2)
    assert few.verdict_reason == "8 eigenvalues are too few to count outliers: k must be 10 or more"
    none = vs.hessian_class_structure(probe, k=20, n_vectors=2, n_splits=0)
    assert (none.verdict, none.verdict_reason) == (
        "undecided", "the count was not repeated on parts of the images (n_splits=0)",
    )  # fmt: skip
    x, y = next(iter(probe.batches))
    with pytest.warns(UserWarning, match="3 of 5 classes have images"):
        vs.hessian_class_structure(vs.Probe(probe.model, [(x[y < 3], y[y < 3])]), k=3, n_vectors=2, n_splits=0)


def test_options_that_cannot_be() -> None:
    probe = linear_probe(5, "one", n=20)
    with pytest.raises(
        ValueError, match="Expected n_splits to be 0 or from 2 to the 20 images, received 1; 2 is usual"
    ):
        vs.hessian_class_structure(probe, n_splits=1)
    with pytest.raises(ValueError, match="hessian_class_structure needs logits"):
        vs.hessian_class_structure(vs.Probe(probe.model, probe.batches, vs.Objective(loss="mse")))


def two_batches() -> dict[str, np.ndarray]:
    model, x, y = make("conv", n=24)
    probe = vs.Probe(model, [(x[:9], y[:9]), (x[9:], y[9:])])
    result = vs.hessian_class_structure(probe, k=3, n_vectors=2, parameters="head*", tol=1e-8)
    return {name: value for name, value in vars(result).items() if isinstance(value, np.ndarray)}


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    expected = two_batches()
    for numbers in results_of_ranks(two_batches, tmp_path):
        for name, value in numbers.items():
            if name != "residuals":
                np.testing.assert_allclose(value, expected[name], atol=1e-8, err_msg=name)


def two_batches_with_uneven_memory() -> dict[str, np.ndarray]:
    """Measure with memory for all classes on the first rank and for one class on others."""
    free = 1e9 if distributed.rank() == 0 else 1.0
    with mock.patch.object(_class_gradients, "free_bytes", return_value=free):
        return two_batches()


def test_ranks_hold_as_many_classes_as_the_one_with_the_least_memory(tmp_path: Path) -> None:
    expected = two_batches()
    for numbers in results_of_ranks(two_batches_with_uneven_memory, tmp_path):
        np.testing.assert_allclose(numbers["part_traces"], expected["part_traces"], atol=1e-8)
        np.testing.assert_allclose(numbers["part_values"], expected["part_values"], atol=1e-8)


def test_the_figure_has_a_row_of_three_panels_for_each_result() -> None:
    model, x, y = make("conv", n=24)
    result = vs.hessian_class_structure(vs.Probe(model, [(x, y)]), k=12, n_vectors=2, n_splits=0)
    figure = vs.plot({"a": result, "b": result})
    assert len(figure.axes) == 6
    assert [ax.get_title().partition("\n")[0] for ax in figure.axes[::3]] == ["a", "b"]
    assert all(ax.has_data() for ax in figure.axes)
