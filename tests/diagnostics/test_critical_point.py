"""Critical points of constructed losses: every verdict, from exact eigenvalues and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.constructed_losses import Quartic, rotated
from tests.fixtures.oracles.hessian_oracle import make


def probe_of(model, x, y, size=4, **objective):
    return vs.Probe(
        model, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)], vs.Objective(**objective)
    )


class Bowl(nn.Module):
    """Logits (u, -u) with u = a b or (a^2 + b^2)/2 of its two weights, for every image."""

    def __init__(self, a, b, saddle, sign=1):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))
        self.saddle, self.sign = saddle, sign

    def forward(self, x):
        u = self.w[0] * self.w[1] if self.saddle else 0.5 * self.sign * self.w.square().sum()
        return torch.stack([u, -u]).expand(len(x), 2)


@pytest.mark.parametrize(
    ("point", "saddle", "verdict"),
    [((0.0, 0.0), True, "saddle"), ((0.0, 0.0), False, "minimum"), ((1.0, 0.5), False, "not stationary")],
)
def test_critical_point_of_known_shapes(point, saddle, verdict):
    batches = [(torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.long)) for _ in range(3)]
    result = vs.critical_point(vs.Probe(Bowl(*point, saddle), batches))
    assert result.verdict == verdict
    np.testing.assert_array_equal(result.n_images, [2, 4, 6])
    if saddle:  # log(1 + exp(2 a b)) has the Hessian [[0, 1], [1, 0]] at 0
        np.testing.assert_allclose(result.smallest_eigenvalue, -1, atol=1e-9)
        assert result.slice_loss.min() < result.slice_loss[len(result.slice_loss) // 2]


def test_a_maximum_is_no_minimum():
    # log(1 + exp(-|w|^2)) has the Hessian -I at 0: every direction falls
    batches = [(torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.long))]
    result = vs.critical_point(vs.Probe(Bowl(0.0, 0.0, False, sign=-1), batches))
    np.testing.assert_allclose(result.smallest_eigenvalue, -1, atol=1e-9)
    assert result.verdict == "saddle"


def test_critical_point_gradient_norms():
    model, x, y = make()
    scale = {name: torch.full_like(p, 0.3) for name, p in model.named_parameters()}
    result = vs.critical_point(probe_of(model, x, y, weight_decay=0.1, l2="adamw", decay_scale=scale), n_points=3)
    parameters = list(model.parameters())
    data = torch.autograd.grad(vs.Objective().data_loss(model(x), y), parameters)

    def norm(factor):
        return float(sum((g + factor * p.detach()).square().sum() for g, p in zip(data, parameters)).sqrt())

    assert result.gradient_norm_nll == pytest.approx(norm(0.0), rel=1e-12)
    assert result.gradient_norm_half_sq == pytest.approx(norm(0.1), rel=1e-12)
    assert result.gradient_norm_adamw == pytest.approx(norm(0.03), rel=1e-12)
    assert result.gradient_norm[-1] == pytest.approx(norm(0.03), rel=1e-12)


def judged(model, **options):
    batches = [(torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.long))]
    return vs.critical_point(vs.Probe(model, batches), **options)


@pytest.mark.parametrize("largest", [56.0, 225.0, 1e4])
@pytest.mark.parametrize("smallest", [-0.5, -1e-2])
def test_a_small_negative_eigenvalue_beside_a_large_one_is_a_saddle(largest, smallest):
    bulk = np.linspace(0.0, largest / 50, 20)
    found = judged(Quartic(rotated([largest, *bulk, smallest])))
    assert smallest - 1e-9 <= found.smallest_eigenvalue[-1] < -found.smallest_residual[-1]  # a Ritz value is inside
    assert found.verdict == "saddle", found.reasons


@pytest.mark.parametrize(
    ("spectrum", "verdict"),
    [
        ([225.0, 3.0, 0.01], "minimum"),
        ([225.0, 3.0, 0.0], "minimum"),  # a flat direction along which nothing falls
        ([-1.0, -2.0, -3.0], "saddle"),  # a maximum can be left downhill
        ([-1.0, -2.0, 0.0], "saddle"),
        ([1e-9, -1e-11], "saddle"),  # the sign of curvature does not depend on its unit
        ([1e-9, 1e-11], "minimum"),
        ([0.0, 0.0, 0.0], "inconclusive"),
    ],
)
def test_every_verdict_of_a_quadratic(spectrum, verdict):
    found = judged(Quartic(rotated(spectrum)))
    assert found.verdict == verdict, found.reasons


def test_verdicts_of_random_spectra():
    generator = np.random.default_rng(0)
    for draw in range(12):
        n, largest = int(generator.integers(2, 25)), 10 ** generator.uniform(-3, 3)
        spectrum = largest * 10 ** generator.uniform(-2, 0, n)
        spectrum[: draw % 3] *= -(10 ** generator.uniform(-2, 0))
        found = judged(Quartic(rotated(spectrum, draw)), n_points=3)
        assert found.verdict == ("saddle" if draw % 3 else "minimum"), (spectrum, found.reasons)


def test_a_gradient_is_judged_by_what_a_step_gains():
    for spectrum in ([4.0, 1.0], [4.0, -1.0], [-4.0, -1.0]):
        # |g|^2 / (2 |H| L) with L = log 2: 0.4 % of the objective, then 0.004 % (g g^T / 2 changes H by 1 % at most)
        for gradient, stationary in ((0.15, False), (0.015, True)):
            found = judged(Quartic(np.diag(spectrum), gradient=[gradient, 0.0]))
            assert found.decrease == pytest.approx(gradient**2 / (8 * np.log(2)), rel=2e-2)
            assert (found.verdict != "not stationary") == stationary
    assert judged(Quartic(np.zeros((2, 2)), gradient=[1e-9, 0.0])).verdict == "inconclusive"  # H is 5e-19


def test_a_flat_direction_that_falls_is_no_minimum():
    found = judged(Quartic(np.diag([2.0, 0.0]), quartic=torch.tensor([0.0, -1.0])))
    assert abs(found.smallest_eigenvalue[-1]) <= found.smallest_residual[-1]
    assert found.verdict == "inconclusive"


def test_a_zero_hessian_with_a_gradient_of_rounding_is_inconclusive():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return torch.stack([(self.w - self.w.detach()).sum() * 1e-18, x.new_zeros(())]).expand(len(x), 2)

    found = judged(Constant())
    assert found.gradient_norm[-1] > 0
    assert found.verdict == "inconclusive"


def test_unconverged_eigenvalues_are_inconclusive():
    found = judged(Quartic(rotated(np.linspace(-1, 50, 60))), max_products=3)
    assert not found.converged[-1]
    assert found.verdict == "inconclusive"
