"""Diagonals against dense matrices in float64 and against products with unit vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks import forms_of_batches as forms
from tests.fixtures.oracles.hessian_oracle import dense_hessian, logit_jacobian, make
from vitscope.core.undefined_values import NullWarning
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.start_vector import random_signs, vector_seed


@pytest.mark.parametrize("kind", ["conv", pytest.param("transformer", marks=pytest.mark.slow)])
def test_the_exact_diagonal_is_that_of_the_dense_hessian(kind: str) -> None:
    model, x, y = make(kind)
    objective = vs.Objective(weight_decay=0.1)
    dense = dense_hessian(model, x, y, objective)
    result = vs.hessian_diagonal(vs.Probe(model, [(x[:5], y[:5]), (x[5:], y[5:])], objective), method="exact")
    np.testing.assert_allclose(result.diagonal, dense.diagonal(), atol=1e-12)
    assert result.trace == pytest.approx(np.trace(dense), rel=1e-12)
    assert (result.standard_error == 0).all()
    names = [name for name, _ in model.named_parameters()]
    assert result.parameters == tuple(names)
    places = np.cumsum([0, *result.sizes])
    for i in range(len(names)):
        entries = dense.diagonal()[places[i] : places[i + 1]]
        assert result.mean[i] == pytest.approx(entries.mean(), abs=1e-12)
        np.testing.assert_allclose(result.quantiles[i], np.quantile(entries, [0.05, 0.5, 0.95]), atol=1e-12)
        assert result.negative_share[i] == pytest.approx((entries < 0).mean())


def test_the_exact_gauss_newton_diagonal_is_that_of_jacobians() -> None:
    model, x, y = make("conv", soft=True)
    jacobian = logit_jacobian(model, x).numpy()
    p = model(x).softmax(1).detach().numpy()
    middle = np.einsum("ic,cd->icd", p, np.eye(3)) - np.einsum("ic,id->icd", p, p)
    expected = np.einsum("icp,icd,idp->p", jacobian, middle, jacobian) / len(x)
    probe = vs.Probe(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    result = vs.hessian_diagonal(probe, method="exact", operator="ggn", micro_batch=2)
    np.testing.assert_allclose(result.diagonal, expected, atol=1e-13)
    assert result.n_products == 0
    head = vs.hessian_diagonal(probe, method="exact", operator="ggn", parameters="head*")
    np.testing.assert_allclose(head.diagonal, expected[-len(head.diagonal) :], atol=1e-13)


@pytest.mark.parametrize("operator", ["ggn", "fisher_mc"])
def test_micro_batches_change_no_exact_diagonal(operator: str) -> None:
    """Labels are drawn by the number of an image among all, wherever batches and their parts begin."""
    model, x, y = make("conv")
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    options: dict[str, Any] = {"method": "exact", "operator": operator, "parameters": "head*", "seed": 3}
    whole = vs.hessian_diagonal(vs.Probe(model, [(x, y)]), **options)
    parts = vs.hessian_diagonal(vs.Probe(model, batches), micro_batch=2, **options)
    np.testing.assert_allclose(parts.diagonal, whole.diagonal, rtol=1e-12, atol=1e-16)


@pytest.mark.filterwarnings("ignore:Network does not run")  # batches of more than images
@pytest.mark.parametrize(
    ("form", "operator"),
    [
        ("mse", "ggn"),
        ("bce", "fisher_mc"),
        pytest.param("dense", "ggn", marks=pytest.mark.slow),
        pytest.param("dense", "fisher_empirical", marks=pytest.mark.slow),
        ("own loss", "fisher_empirical"),
        pytest.param("triple", "fisher_mc", marks=pytest.mark.slow),
    ],
)
def test_the_exact_diagonal_is_that_of_products_with_unit_vectors(form: str, operator: str) -> None:
    probe = forms.probe(form)
    options: dict[str, Any] = {"operator": operator, "parameters": ["*head*", "norm*"], "seed": 3}
    with curvatures(probe, **options) as operators:
        mean = operators.mean()
        units = torch.eye(mean.size, dtype=mean.dtype)
        expected = [float(mean(unit)[i]) for i, unit in enumerate(units)]
    result = vs.hessian_diagonal(probe, method="exact", **options)
    np.testing.assert_allclose(result.diagonal, expected, atol=1e-13)


def test_the_estimate_is_the_mean_of_signs_times_products() -> None:
    model, x, y = make("transformer")
    objective = vs.Objective(weight_decay=0.1)
    dense = dense_hessian(model, x, y, objective)
    probe = vs.Probe(model, [(x, y)], objective)
    result = vs.hessian_diagonal(probe, n_vectors=200, seed=2)
    with curvatures(probe) as operators:
        signs = np.stack([random_signs(operators.mean(), vector_seed(2, i)).numpy() for i in range(200)])
    samples = signs * (signs @ dense)
    np.testing.assert_allclose(result.diagonal, samples.mean(0), atol=1e-10)
    np.testing.assert_allclose(result.standard_error, samples.std(0, ddof=1) / np.sqrt(200), atol=1e-10)
    # the variance of an entry is the squared rest of its row; with 200 signs the estimate of its root is off by 5 % (1 sigma)
    rest = np.sqrt((dense**2).sum(1) - dense.diagonal() ** 2) / np.sqrt(200)
    visible = rest > 1e-6
    np.testing.assert_allclose(result.standard_error[visible], rest[visible], rtol=0.35)
    # of 195 entries 0.01 lie beyond four standard errors
    assert (np.abs(result.diagonal - dense.diagonal())[visible] < 4.5 * rest[visible]).all()
    places = np.cumsum([0, *result.sizes])[:-1]
    means = np.add.reduceat(samples, places, axis=1) / result.sizes
    np.testing.assert_allclose(result.mean, means.mean(0), atol=1e-10)
    np.testing.assert_allclose(result.mean_standard_error, means.std(0, ddof=1) / np.sqrt(200), atol=1e-10)
    assert result.noise_share == pytest.approx(np.square(result.standard_error).mean() / result.diagonal.var())
    assert result.trace == pytest.approx(samples.mean(0).sum())
    is_negative = result.diagonal < -2 * result.standard_error
    shares = np.add.reduceat(is_negative.astype(float), places) / result.sizes
    np.testing.assert_allclose(result.negative_share, shares, rtol=1e-14)
    assert 0 < is_negative.sum() < (result.diagonal < 0).sum()


def test_l2_terms_are_on_the_diagonal() -> None:
    model, x, y = make("conv")
    scale = {name: torch.rand(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for objective in (vs.Objective(weight_decay=0.3), vs.Objective(weight_decay=0.3, l2="adamw", decay_scale=scale)):
        plain = vs.hessian_diagonal(vs.Probe(model, [(x, y)]), method="exact", operator="ggn").diagonal
        decayed = vs.hessian_diagonal(vs.Probe(model, [(x, y)], objective), method="exact", operator="ggn").diagonal
        flat = torch.cat([scale[name].reshape(-1) for name, _ in model.named_parameters()]).numpy()
        np.testing.assert_allclose(decayed - plain, 0.3 if objective.l2 == "half_sq" else 0.3 * flat, atol=1e-12)


def test_what_cannot_be() -> None:
    model, x, y = make("conv")
    with pytest.raises(ValueError, match="Expected method to be one of hutchinson, exact, received 'diag'"):
        vs.hessian_diagonal(vs.Probe(model, [(x, y)]), method="diag")
    with pytest.raises(ValueError, match="Expected method='hutchinson' with l2='sum_norm'"):
        vs.hessian_diagonal(vs.Probe(model, [(x, y)], vs.Objective(0.1, l2="sum_norm")), method="exact")
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(25, 200)).double()
    with pytest.raises(ValueError, match="at most 4096 parameters .* received 5200"):
        vs.hessian_diagonal(vs.Probe(wide, [(x, y)]), method="exact")
    with pytest.warns(NullWarning, match="one random vector"):
        result = vs.hessian_diagonal(vs.Probe(model, [(x, y)]), n_vectors=1)
    assert np.isnan(result.standard_error).all()
    assert np.isnan(result.noise_share)
    assert np.isnan(result.negative_share).all()
    assert not {"noise_share", "negative_share"} & set(result.scalars())


def test_the_figure_has_a_row_for_each_result() -> None:
    model, x, y = make("conv")
    result = vs.hessian_diagonal(vs.Probe(model, [(x, y)]), n_vectors=3)
    figure = vs.plot({"a": result, "b": result})
    assert [ax.get_title()[0] for ax in figure.axes] == ["a", "b"]
