"""The spectrum by batch, the trace, the Rayleigh split and sharpness measures against dense matrices in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, logit_jacobian, make
from vitscope.diagnostics.hessian import _nep_statistics
from vitscope.diagnostics.hessian.hessian_trace import _signs
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.models.structure.parameter_groups import parameter_kinds


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
    for value in (5.0, 0.0, -1e-200):
        grid, density = _nep_statistics.kernel_density(np.full((2, 2), value))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace(method):
    model, x, y = make()
    probe = probe_of(model, x, y, weight_decay=0.05)
    trace = np.trace(dense_hessian(model, x, y, probe.objective))
    result = vs.hessian_trace(probe, method=method, n_vectors=60)
    assert abs(result.trace - trace) < 4 * result.standard_error
    assert result.n_products == 60
    assert len(result.estimates) == (60 if method == "hutchinson" else 20)
    assert result.trace == pytest.approx(result.estimates.mean(), rel=1e-12)
    spread = result.estimates.std(ddof=1) / np.sqrt(len(result.estimates))
    assert result.standard_error == pytest.approx(spread, rel=1e-12)


def test_vectors_of_the_sketch_are_none_of_the_estimates() -> None:
    """An estimate from a vector of the sketch would be biased: the basis holds its product."""
    model, x, y = make()
    with curvatures(probe_of(model, x, y)) as operators:
        mean = operators.mean()
        vectors = [_signs(mean, seed, stream, number) for seed in (0, 1) for stream in (0, 1) for number in range(20)]
    signs = torch.stack(vectors)
    assert bool((signs.abs() == 1).all())
    cosines = (signs @ signs.T / mean.size).fill_diagonal_(0)
    # 3160 inner products of independent signs: six standard deviations are exceeded in 1 of 10^5 cases
    assert float(cosines.abs().max()) < 6 / mean.size**0.5


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
    kinds = parameter_kinds(model, x)
    sizes = {
        kind: sum(p.numel() for name, p in model.named_parameters() if kinds[name] == kind) for kind in result.kinds
    }
    np.testing.assert_allclose(result.share_of_parameters, np.array(list(sizes.values())) / len(dense), rtol=1e-14)
    parts = np.split(vectors[:, 0], np.cumsum([p.numel() for p in model.parameters()])[:-1])
    named = list(zip((kinds[name] for name, _ in model.named_parameters()), parts))
    mass = [sum(np.square(part).sum() for kind, part in named if kind == group) for group in result.kinds]
    np.testing.assert_allclose(result.mass[-1], mass, atol=1e-3)  # as the eigenvector


def test_rayleigh_split_lists_no_pair_twice():
    model, x, y = make("transformer")
    result = vs.rayleigh_split(probe_of(model, x, y), k=3, n_ends=2, tol=1e-8)
    assert 4 <= len(result.eigenvalues) < 7  # three by magnitude and the ends, of which the top is one
    assert len(np.unique(result.eigenvalues)) == len(result.eigenvalues) == len(result.mass)


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
    figure = vs.plot({"no limit": dataclasses.replace(result, threshold=float("nan")), "limit": result})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Largest eigenvalue", "Limit of stability"]
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


def test_nep_stability_mixes_images_of_batchnorm_on_batch_statistics():
    """The number of classes is read from all images: of one, BatchNorm of vectors has no variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    result = vs.nep_stability(probe_of(model, x, y), ks=(1,), batch_sizes=(), tols=(1e-2,), k=1, bn="batch")
    assert list(result.mixup) == [False, True]
