"""Exponents of constructed power laws in closed form, and curvatures against dense Hessians in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import dense_hessian, make
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.kronecker._power_laws import fit_power_law, mean_by_kind


@pytest.mark.parametrize("exponent", [2.0, 1.0, 0.5])
def test_a_linear_layer_has_its_constructed_exponent(exponent: float) -> None:
    """Inputs with second moments a_k and errors of the weights a_k^b give h_k ~ a_k and s_k ~ a_k^(1 + b), so h ~ s^(1/(1+b))."""
    d = 8
    moments = torch.arange(1, d + 1, dtype=torch.float64) ** -1.5
    x = torch.diag((d * moments).sqrt())  # one image a direction: the mean of x x^T is diag(a)
    model = nn.Linear(d, d, bias=False).double()
    target = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(target + torch.diag(moments ** (1 / exponent - 1)))
    probe = vs.Probe(model, [(x, x @ target.T)], vs.Objective(weight_decay=0.3, loss="mse"))
    result = vs.curvature_exponents(probe, n_singular_values=8)
    np.testing.assert_allclose(result.exponents, exponent, rtol=1e-9)
    np.testing.assert_allclose(result.exponent_half_widths, 0, atol=1e-8)
    np.testing.assert_allclose(result.r_squared, 1, rtol=1e-12)
    np.testing.assert_allclose(result.curvatures[0], 2 / d * np.sort(moments.numpy())[::-1], rtol=1e-10)
    assert result.n_products == 8


@pytest.mark.filterwarnings("ignore:curvature_exponents")
def test_curvatures_are_those_of_the_dense_hessian() -> None:
    """Singular vectors are known to rounding over the gaps of singular values, which are above 1e-3 here."""
    model, x, y = make("conv", n=8)
    dense = dense_hessian(model, x, y, vs.Objective())
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(named.values()))))
    places = dict(zip(named, np.cumsum([0, *(p.numel() for p in named.values())])))
    result = vs.curvature_exponents(vs.Probe(model, [(x[:3], y[:3]), (x[3:], y[3:])]), n_singular_values=4)
    assert result.layers == ("conv.weight", "head.weight")
    for name, s, h in zip(result.layers, result.singular_values, result.curvatures):
        rows = slice(places[name], places[name] + named[name].numel())
        u, expected, vh = np.linalg.svd(gradients[name].reshape(len(named[name]), -1).numpy(), full_matrices=False)
        n_known = int(np.isfinite(s).sum())
        assert n_known >= 2
        np.testing.assert_allclose(s[:n_known], expected[:n_known], rtol=1e-10)
        for k in range(n_known):
            direction = np.outer(u[:, k], vh[k]).ravel()
            assert h[k] == pytest.approx(direction @ dense[rows, rows] @ direction, rel=1e-8, abs=1e-12)


def test_fits_are_those_of_linregress() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-3, 0, 12))
    y = x**1.4 * np.exp(0.2 * rng.standard_normal(12))
    y[3] = -1.0
    fit = fit_power_law(x, y)
    used = y > 0
    expected = stats.linregress(np.log(x[used]), np.log(y[used]))
    assert fit.n_points == 11
    assert fit.exponent == pytest.approx(expected.slope)
    assert fit.half_width == pytest.approx(stats.t.ppf(0.975, 9) * expected.stderr)
    assert fit.r_squared == pytest.approx(expected.rvalue**2)
    assert np.isnan(fit_power_law(x[:3], y[:3]).exponent)
    assert np.isnan(fit_power_law(np.ones(6), x[:6]).exponent)


def test_means_by_kind() -> None:
    values = np.array([1.0, 2.0, 4.5, 7.0, np.nan])
    means, ends = mean_by_kind(values, ("conv", "conv", "conv", "head", "head"), ("conv", "head"))
    np.testing.assert_allclose(means, [2.5, 7.0])
    half = stats.t.ppf(0.975, 2) * values[:3].std(ddof=1) / 3**0.5
    np.testing.assert_allclose(ends[0], [2.5 - half, 2.5 + half])
    assert np.isnan(ends[1]).all()


def test_what_cannot_be() -> None:
    model, x, y = make("conv")
    with pytest.raises(ValueError, match="Expected n_singular_values of at least 4, received 3; 10 is usual"):
        vs.curvature_exponents(vs.Probe(model, [(x, y)]), n_singular_values=3)
    with pytest.raises(ValueError, match="at least one weight of two or more dimensions"):
        vs.curvature_exponents(vs.Probe(model, [(x, y)]), parameters="norm*")
    with pytest.warns(NullWarning, match="fewer than 4 directions of positive curvature"):
        result = vs.curvature_exponents(vs.Probe(model, [(x, y)]), parameters="conv*")
    assert np.isnan(result.exponents).all()


@pytest.mark.filterwarnings("ignore:curvature_exponents")
def test_the_figure_has_a_row_of_two_panels_for_each_result() -> None:
    model, x, y = make("transformer")
    result = vs.curvature_exponents(vs.Probe(model, [(x, y)]), n_singular_values=4)
    figure = vs.plot({"a": result, "b": result})
    assert [ax.get_title() for ax in figure.axes[::2]] == ["a", "b"]
