"""The spectral density against dense matrices in float64: moments, eigenvalues and masses by sign."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.constructed_losses import Quartic, rotated
from tests.fixtures.oracles.hessian_oracle import dense_hessian, make
from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.quadrature import quadrature_rule


def probe_of(model, x, y, size=4, **objective):
    return vs.Probe(
        model, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)], vs.Objective(**objective)
    )


def test_density_moments_are_the_probe_vectors_own():
    model, x, y = make()
    probe = probe_of(model, x, y, weight_decay=0.05)
    dense = dense_hessian(model, x, y, probe.objective)
    result = vs.spectral_density(probe, n_vectors=3, n_steps=12)
    # a Gauss rule of 12 nodes is exact to degree 23, so its moments are v^T H^p v for the same sign vectors
    from vitscope.linalg.curvature.operator_factory import curvatures
    from vitscope.linalg.curvature.start_vector import random_signs, vector_seed

    with curvatures(probe) as made:
        signs = np.array([random_signs(made.mean(), vector_seed(0, i)).numpy() for i in range(3)])
    powers = [np.mean([v @ np.linalg.matrix_power(dense, p) @ v / len(v) for v in signs]) for p in range(1, 5)]
    np.testing.assert_allclose(result.moments, powers, rtol=1e-9)
    np.testing.assert_allclose(result.weights.sum(1), 1, atol=1e-12)
    assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)


def test_density_with_all_steps_holds_every_eigenvalue():
    model, x, y = make(n=5)
    probe = probe_of(model, x, y)
    dense = np.linalg.eigvalsh(dense_hessian(model, x, y, probe.objective))
    result = vs.spectral_density(probe, n_vectors=1, n_steps=10_000)
    np.testing.assert_allclose(result.nodes[0], dense, atol=1e-8)
    assert result.n_products == len(dense)


@pytest.mark.parametrize(
    ("dtype", "width", "scale"),
    [
        pytest.param(*case, marks=() if i in (0, 3, 6) else pytest.mark.slow)
        for i, case in enumerate(itertools.product(("float64", "float32"), (8, 64), (1.0, 20.0)))
    ],
)
def test_a_semi_definite_matrix_has_no_negative_mass(dtype, width, scale):
    """With large weights the softmax saturates: its curvature is a difference of nearly equal numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, width), nn.ReLU(), nn.Linear(width, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(3, (4,))
    for operator in ("ggn", "fisher_mc", "fisher_empirical"):
        found = vs.spectral_density(vs.Probe(model, [(x, y)]), operator=operator, dtype=dtype, n_vectors=2, n_steps=40)
        assert found.negative_mass == 0.0, operator
        assert 0.0 <= found.near_zero_mass <= 1 + 1e-9
        if scale == 1.0 and width == 64:  # of 1,859 eigenvalues at most 8 (images times classes less one) are not zero
            assert found.near_zero_mass > 0.9
            top = vs.hessian_max_eigenvalue_spectrum(
                vs.Probe(model, [(x, y)]), operator=operator, dtype=dtype, n_top=12
            )
            assert top.negative_eigenvalue_proportion == 0.0
            assert top.near_zero_proportion >= 4 / 12


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_known_negative_mass(dtype):
    spectrum = np.concatenate([np.full(20, -1e-3), np.full(50, 0.0), np.linspace(0.5, 100, 30)])
    batches = [(torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.long))]
    found = vs.spectral_density(vs.Probe(Quartic(rotated(spectrum)), batches), n_vectors=12, n_steps=40, dtype=dtype)
    # v^T P v / 100 of a projection P of rank r and sign vectors: mean r / 100, variance below 2 r / 100^2; 12 vectors
    for mass, rank in ((found.negative_mass, 20), (found.near_zero_mass, 50)):
        assert abs(mass - rank / 100) < 4 * np.sqrt(2 * rank / 12) / 100


def test_mass_of_a_continuous_spectrum_is_bounded():
    spectrum = np.linspace(-1, 3, 400)
    batches = [(torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.long))]
    found = vs.spectral_density(vs.Probe(Quartic(rotated(spectrum)), batches), n_vectors=10, n_steps=30)
    spread = 4 * np.sqrt(2 * 100 / 10) / 400
    assert found.negative_mass - spread <= 0.25 <= found.negative_mass + found.near_zero_mass + spread
    assert found.near_zero_mass < 0.15


def test_masses_by_sign_of_given_nodes():
    from vitscope.diagnostics.hessian.spectral_density import masses_by_sign

    nodes = np.array([[-3.0, -2.0, -0.1, 1e-9, 0.5, 4.0]])
    weights = np.array([[0.1, 0.1, 0.1, 0.4, 0.1, 0.2]])
    for residuals, resolution, expected in (
        (np.zeros((1, 6)), 0.0, (0.3, 0.0)),
        (np.zeros((1, 6)), 1e-8, (0.3, 0.4)),
        (np.full((1, 6), 5.0), 1e-8, (0.2, 0.6)),  # the next nodes on either side, not those beyond
    ):
        assert masses_by_sign(nodes, weights, residuals, np.array([resolution])) == pytest.approx(expected)


def test_moments_beyond_the_degree_of_a_rule_are_not_given():
    """A rule of m nodes is exact to degree 2 m - 1: the mean square of one node is the square of the mean."""
    model, x, y = make()
    probe = probe_of(model, x, y)
    results = {n: vs.spectral_density(probe, n_vectors=3, n_steps=n) for n in (1, 2, 3)}
    for n, result in results.items():
        assert list(np.isfinite(result.moments)) == [p <= 2 * n - 1 for p in range(1, 5)]
        known = np.isfinite(result.moments)
        np.testing.assert_allclose(result.moments[known], results[3].moments[known], rtol=1e-9)
    assert "mean_square" not in results[1].scalars()
    assert results[2].scalars()["mean_square"] == pytest.approx(results[3].moments[1], rel=1e-9)


def test_an_invariant_subspace_gives_all_moments():
    """All eigenvalues are 2: one step spans an invariant subspace."""
    probe = vs.spectral_density_of(2 * np.eye(5), n_vectors=2, n_steps=1)
    np.testing.assert_allclose(probe.moments, [2, 4, 8, 16], rtol=1e-12)


class Rough:
    """A diagonal matrix whose products are stated to be off by 0.25."""

    size, dtype, device, shift, product_error = 6, torch.float64, torch.device("cpu"), 0.0, 0.25

    def unshifted(self, v: torch.Tensor) -> torch.Tensor:
        return torch.arange(6.0, dtype=torch.float64) * v


def test_residuals_and_resolution_hold_the_error_of_products():
    exact = quadrature_rule(type("Exact", (Rough,), {"product_error": 0.0})(), 0, 3, BasisBuffer())
    rough = quadrature_rule(Rough(), 0, 3, BasisBuffer())
    np.testing.assert_array_equal(rough["nodes"], exact["nodes"])
    np.testing.assert_allclose(rough["residuals"], exact["residuals"] + 0.25, rtol=1e-12)
    assert rough["resolution"] == pytest.approx(exact["resolution"] + 0.25, rel=1e-12)
