"""The spectrum, density, trace, critical point and the reviewer's measures against dense matrices in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.helpers.hessian_oracle import by_magnitude, dense_hessian, logit_jacobian, make
from vitscope.diagnostics.hessian import _nep_statistics


def probe_of(model, x, y, size=4, **objective):
    return vs.Probe(
        model, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)], vs.Objective(**objective)
    )


def spectra(probe):
    return [np.linalg.eigvalsh(dense_hessian(probe.model, x, y, probe.objective)) for x, y in probe.batches]


def test_spectrum_by_batch():
    model, x, y = make("transformer")
    probe = probe_of(model, x, y, weight_decay=0.05)
    dense = spectra(probe)
    result = vs.hessian_max_eigenvalue_spectrum(probe, n_top=4, n_ends=1)
    expected = np.array([by_magnitude(s, 4) for s in dense])
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-3)
    np.testing.assert_allclose(result.smallest[:, 0], [s[0] for s in dense], rtol=1e-3)
    np.testing.assert_allclose(result.largest[:, 0], [s[-1] for s in dense], rtol=1e-3)
    assert result.negative_eigenvalue_proportion == (expected < -result.residuals).mean()
    positive = result.eigenvalues[result.eigenvalues > result.residuals]
    assert result.average_positive_eigenvalue == pytest.approx(positive.mean(), rel=1e-12)
    np.testing.assert_array_equal(result.l2_contribution, 0.05)
    # the density integrates to one: four bandwidths of margin hold all but 6e-5 of a Gaussian
    assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)


def test_spectrum_resumes_from_partial_rows():
    model, x, y = make()
    probe = probe_of(model, x, y)
    partial = {}
    whole = vs.hessian_max_eigenvalue_spectrum(probe, n_top=3, partial=partial)
    assert sorted(partial) == ["batch-0000", "batch-0001", "batch-0002"]
    partial.pop("batch-0002")
    marked = {**partial["batch-0000"], "eigenvalues": np.full(3, 123.0)}
    again = vs.hessian_max_eigenvalue_spectrum(probe, n_top=3, partial={**partial, "batch-0000": marked})
    np.testing.assert_array_equal(again.eigenvalues[0], 123.0)
    np.testing.assert_array_equal(again.eigenvalues[2], whole.eigenvalues[2])


def test_pooled_statistics_of_known_values():
    values, residuals = np.array([[-3.0, 2.0], [0.05, 4.0]]), np.full((2, 2), 0.1)
    assert _nep_statistics.negative_proportion(values, residuals) == 0.25
    assert _nep_statistics.near_zero_proportion(values, residuals) == 0.25
    assert _nep_statistics.positive_average(values, residuals) == 3.0
    assert np.isnan(_nep_statistics.positive_average(-np.ones((1, 1)), np.zeros((1, 1))))
    grid, density = _nep_statistics.kernel_density(np.full((2, 2), 5.0))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


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


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace(method):
    model, x, y = make()
    probe = probe_of(model, x, y, weight_decay=0.05)
    trace = np.trace(dense_hessian(model, x, y, probe.objective))
    result = vs.hessian_trace(probe, method=method, n_vectors=60)
    assert abs(result.trace - trace) < 4 * result.standard_error
    assert result.n_products == 60


def test_hutch_plus_plus_is_exact_with_a_full_sketch():
    model, x, y = make()
    probe = probe_of(model, x, y, weight_decay=0.05)
    size = model.conv.weight.numel()  # the first parameter
    dense = dense_hessian(model, x, y, probe.objective)[:size, :size]
    result = vs.hessian_trace(probe, method="hutch++", n_vectors=3 * size, parameters="layer:conv")
    assert result.trace == pytest.approx(np.trace(dense), abs=1e-8)


def test_an_average_over_no_first_value_is_not_logged() -> None:
    model, x, y = make("transformer")
    found = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2)
    negative = dataclasses.replace(found, top1_average_positive_eigenvalue=float("nan"))
    assert set(found.scalars()) - set(negative.scalars()) == {"top1_average_positive_eigenvalue"}


def test_rayleigh_split_adds_up():
    model, x, y = make("transformer")
    probe = probe_of(model, x, y, weight_decay=0.05)
    result = vs.rayleigh_split(probe, k=3, n_ends=1, tol=1e-8)
    dense = dense_hessian(model, x, y, probe.objective)
    values, vectors = np.linalg.eigh(dense)
    jacobian, p = logit_jacobian(model, x).numpy(), torch.softmax(model(x), 1).detach().numpy()
    inner = np.einsum("bc,cd->bcd", p, np.eye(3)) - np.einsum("bc,bd->bcd", p, p)
    ggn = np.einsum("bci,bcd,bdj->ij", jacobian, inner, jacobian) / len(x)
    assert result.eigenvalues[-1] == pytest.approx(values[0], rel=1e-8)
    # the eigenvector is known to the root of the eigenvalue's accuracy
    assert result.gauss_newton[-1] == pytest.approx(vectors[:, 0] @ ggn @ vectors[:, 0], abs=1e-3)
    np.testing.assert_allclose(result.gauss_newton + result.remainder + result.l2, result.eigenvalues, atol=1e-12)
    np.testing.assert_allclose(result.mass.sum(1), 1, atol=1e-12)
    assert (result.gauss_newton >= 0).all()


def test_rayleigh_split_lists_no_pair_twice():
    model, x, y = make("transformer")
    result = vs.rayleigh_split(probe_of(model, x, y), k=3, n_ends=2, tol=1e-8)
    assert 4 <= len(result.eigenvalues) < 7  # three by magnitude and the ends, of which the top is one
    assert len(np.unique(result.eigenvalues)) == len(result.eigenvalues) == len(result.mass)


class Convolutions(nn.Module):
    """Two convolutions, the first with a BatchNorm where asked for, and a linear layer, with ReLUs."""

    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-12) if norm else nn.Identity()
        self.second, self.head = nn.Conv2d(4, 3, 2, bias=False), nn.Linear(12, 3, bias=False)

    def forward(self, x):
        z = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(z)).flatten(1))


def scaled_hessian(model, x, y, normalization):
    """Return the eigenvalues by magnitude of D H D of the parameters of two or more dimensions, dense in float64."""
    moves = torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in model.parameters()]).numpy()
    if normalization == "weight":
        d = torch.cat([p.detach().abs().reshape(-1) for p in model.parameters()]).numpy()
    else:
        rows = [p.detach().flatten(1).norm(dim=1, keepdim=True).expand(len(p), p[0].numel()) if p.ndim > 1 else p.detach()
                for p in model.parameters()]  # fmt: skip
        d = torch.cat([row.reshape(-1) for row in rows]).numpy()
    d = d * moves
    values = np.linalg.eigvalsh(d[:, None] * dense_hessian(model, x, y, vs.Objective()) * d)
    return by_magnitude(values, 3)


def linear_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))


@pytest.mark.parametrize("kind", ["linear", "convolution", "norm"])
def test_normalized_hessian_ignores_a_rescaling_of_single_units(kind):
    torch.manual_seed(0)
    model = (linear_layers() if kind == "linear" else Convolutions(kind == "norm")).double().eval()
    _, x, y = make()
    first = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9).eigenvalues
    filters = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9, normalization="filter").eigenvalues
    np.testing.assert_allclose(first, scaled_hessian(model, x, y, "weight"), rtol=1e-6)
    np.testing.assert_allclose(filters, scaled_hessian(model, x, y, "filter"), rtol=1e-6)
    plain, before = vs.hessian_eigenvalues(probe_of(model, x, y), k=3).eigenvalues, model(x).detach()
    with torch.no_grad():  # the same function: ReLU is positively homogeneous
        if kind == "linear":
            model[1].weight[2].mul_(5)
            model[3].weight[:, 2].mul_(1 / 5)
        else:
            model.second.weight[1].mul_(5)
            model.head.weight[:, 4:8].mul_(1 / 5)
            if kind == "norm":  # the unit before the layer, with its running statistics
                model.first.weight[0].mul_(3)
                model.norm.running_mean[0].mul_(3)
                model.norm.running_var[0].mul_(9)
            else:
                model.first.weight[0].mul_(3)
                model.second.weight[:, 0].mul_(1 / 3)
    np.testing.assert_allclose(model(x).detach(), before, rtol=1e-9)
    second = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9).eigenvalues
    np.testing.assert_allclose(second, first, rtol=1e-7)
    assert not np.allclose(vs.hessian_eigenvalues(probe_of(model, x, y), k=3).eigenvalues, plain, rtol=0.1)
    again = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9, normalization="filter").eigenvalues
    assert not np.allclose(again, filters, rtol=1e-2)  # as its description says


def test_normalized_hessian_ignores_a_filter_before_its_own_batch_statistics():
    torch.manual_seed(0)
    model = Convolutions(norm=True).double()
    _, x, y = make()
    found = []
    for _ in range(2):
        found.append([
            vs.normalized_hessian(probe_of(model, x, y), k=2, tol=1e-9, bn="batch", normalization=n).eigenvalues
            for n in ("weight", "filter")
        ])  # fmt: skip
        with torch.no_grad():
            model.first.weight[0].mul_(3)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_filter_norms_ignore_a_rescaling_of_whole_layers():
    torch.manual_seed(0)
    model = linear_layers().double()
    _, x, y = make()
    options = {"k": 3, "tol": 1e-8, "normalization": "filter"}
    first = vs.normalized_hessian(probe_of(model, x, y), **options)
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[3].weight.mul_(0.25)
    second = vs.normalized_hessian(probe_of(model, x, y), **options)
    np.testing.assert_allclose(second.eigenvalues, first.eigenvalues, rtol=1e-7)
    with pytest.raises(ValueError, match="normalization to be weight or filter, received 'layer'"):
        vs.normalized_hessian(probe_of(model, x, y), normalization="layer")


def test_preconditioned_sharpness():
    model, x, y = make()
    scale = {name: 0.1 + torch.rand_like(p) for name, p in model.named_parameters()}
    probe = probe_of(model, x, y, weight_decay=0.1, l2="adamw", decay_scale=scale)
    dense = dense_hessian(model, x, y, probe.objective)
    flat = torch.cat([s.reshape(-1) for s in scale.values()]).numpy()
    result = vs.preconditioned_sharpness(probe, lr=1e-3, k=2, tol=1e-6)
    expected = np.sort(np.linalg.eigvals(dense / flat[:, None]).real)[::-1][:2]
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-6)
    assert result.threshold == pytest.approx(38 / 1e-3)
    assert result.ratio == pytest.approx(expected[0] * 1e-3 / 38, rel=1e-6)
    with pytest.raises(ValueError, match="preconditioner='adamw', received None"):
        vs.preconditioned_sharpness(probe_of(model, x, y), preconditioner="adamw")


def test_nep_stability_agrees_with_the_spectrum():
    model, x, y = make("transformer")
    probe = probe_of(model, x, y)
    result = vs.nep_stability(probe, ks=(1, 3), batch_sizes=(4, 12, 5), tols=(1e-1, 1e-3), k=3)
    rows = list(zip(result.k, result.batch_size, result.tol, result.mixup))
    assert rows == [
        (1, 4, 1e-3, False),
        (3, 4, 1e-3, False),
        (3, 12, 1e-3, False),
        (3, 4, 1e-1, False),
        (3, 4, 1e-3, True),
    ]
    expected = vs.hessian_max_eigenvalue_spectrum(probe, n_top=3)
    assert result.nep[1] == expected.negative_eigenvalue_proportion
    assert result.ape[1] == pytest.approx(expected.average_positive_eigenvalue, rel=1e-9)
    assert list(result.n_batches) == [3, 3, 1, 3, 3]


def test_bn_policy():
    model, x, y = make()
    model.norm.running_mean.fill_(0.5)
    probe = probe_of(model, x, y)
    result = vs.bn_policy(probe, n_top=3)
    np.testing.assert_allclose(result.eigenvalues_eval, [by_magnitude(s, 3) for s in spectra(probe)], rtol=1e-3)
    model.train()
    model.norm.track_running_stats = False
    np.testing.assert_allclose(result.eigenvalues_batch, [by_magnitude(s, 3) for s in spectra(probe)], rtol=1e-3)
    with pytest.raises(ValueError, match="BatchNorm layers, received SmallTransformer without any"):
        vs.bn_policy(probe_of(*make("transformer")))


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


class Quartic(nn.Module):
    """Logits (u, -u) with u = w^T A w / 2 + g^T w + sum of c w^4: for label 1 the loss log(1 + exp(2 u)) has the gradient g
    and the Hessian A + g g^T / 2 at w = 0, whatever the image."""

    def __init__(self, a, gradient=0.0, quartic=0.0):
        super().__init__()
        self.register_buffer("a", torch.as_tensor(a, dtype=torch.float64))
        self.w = nn.Parameter(torch.zeros(len(a), dtype=torch.float64))
        self.gradient, self.quartic = torch.as_tensor(gradient, dtype=torch.float64), quartic

    def forward(self, x):
        u = (
            0.5 * self.w @ (torch.mv(self.get_buffer("a"), self.w))
            + (self.gradient * self.w).sum()
            + (self.quartic * self.w**4).sum()
        )
        return torch.stack([u, -u]).expand(len(x), 2)


def rotated(spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return (q * torch.as_tensor(spectrum, dtype=torch.float64)) @ q.T


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


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("scale", [1.0, 20.0])
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
