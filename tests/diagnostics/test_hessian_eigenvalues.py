"""Eigenvalues and operators against dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, logit_jacobian, make
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.runtime.errors import NumericalError

KINDS = ["conv", "transformer"]


def directions(size):
    """Return six random directions of unit length (6, size): an operator that differs anywhere differs along them."""
    vectors = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return vectors / vectors.norm(dim=1, keepdim=True)


def products(probe, vectors=None, **options):
    """Return the operator's products with vectors (n, size), without them with `directions` (6, size)."""
    with curvatures(probe, **options) as made:
        operator = made.mean()
        return torch.stack([operator(v) for v in (directions(operator.size) if vectors is None else vectors)]).numpy()


def along(dense):
    """Return the same products of a dense matrix."""
    return directions(len(dense)).numpy() @ dense


def probe_of(model, x, y, size=5, **objective):
    return vs.Probe(
        model, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)], vs.Objective(**objective)
    )


@pytest.mark.parametrize(
    ("kind", "soft", "product"),
    [
        ("conv", False, "reverse"),
        ("conv", True, "linearize"),
        ("transformer", True, "reverse"),
        ("transformer", False, "linearize"),
        # pairs of these settings are covered above
        pytest.param("conv", True, "reverse", marks=pytest.mark.slow),
        pytest.param("conv", False, "linearize", marks=pytest.mark.slow),
        pytest.param("transformer", False, "reverse", marks=pytest.mark.slow),
        pytest.param("transformer", True, "linearize", marks=pytest.mark.slow),
    ],
)
def test_hessian_matrix(kind, soft, product):
    model, x, y = make(kind, soft=soft)
    # several chunks are linearized anew for each product, a second each: one chunk there
    size = len(x) if product == "linearize" else 5
    probe = probe_of(model, x, y, size=size, weight_decay=0.1)
    # float64 rounding of sums over a few hundred terms
    expected = along(dense_hessian(model, x, y, probe.objective))
    np.testing.assert_allclose(products(probe, product=product), expected, atol=1e-11)


@pytest.mark.filterwarnings("ignore:l2='sum_norm':UserWarning")
@pytest.mark.parametrize("l2", ["none", "half_sq", "sum_norm", "adamw"])
def test_every_l2_form(l2):
    model, x, y = make()
    scale = {name: 0.5 + p.detach().abs() for name, p in model.named_parameters()}
    probe = probe_of(model, x, y, weight_decay=0.1, l2=l2, decay_scale=scale if l2 == "adamw" else None)
    expected = dense_hessian(model, x, y, probe.objective)
    np.testing.assert_allclose(products(probe), along(expected), atol=1e-11)
    result = vs.hessian_eigenvalues(probe, k=4, tol=1e-6, eigenvectors=True)
    np.testing.assert_allclose(result.eigenvalues, by_magnitude(np.linalg.eigvalsh(expected), 4), rtol=1e-6)
    plain = dense_hessian(model, x, y, vs.Objective())
    share = [v @ (expected - plain) @ v for v in result.eigenvectors]
    np.testing.assert_allclose(result.l2_contribution, share, atol=1e-10)


def test_a_zero_tensor_contributes_zero_under_sum_norm():
    model, x, y = make()
    with torch.no_grad():
        model.head.bias.zero_()
    probe = probe_of(model, x, y, weight_decay=0.1, l2="sum_norm")
    with pytest.warns(UserWarning, match="l2='sum_norm' adds curvature of its own"):
        found = products(probe, torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)[-3:])
    plain = dense_hessian(model, x, y, vs.Objective())
    np.testing.assert_allclose(found[:, -3:], plain[-3:, -3:], atol=1e-11)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_and_empirical_fisher(kind, smoothing):
    model, x, y = make(kind)
    probe = probe_of(model, x, y, label_smoothing=smoothing)
    jacobian = logit_jacobian(model, x).numpy()
    p = torch.softmax(model(x), 1).detach().numpy()
    inner = np.einsum("bc,cd->bcd", p, np.eye(3)) - np.einsum("bc,bd->bcd", p, p)
    ggn = np.einsum("bci,bcd,bdj->ij", jacobian, inner, jacobian) / len(x)
    np.testing.assert_allclose(products(probe, operator="ggn"), along(ggn), atol=1e-11)
    residual = p - (np.eye(3)[y] * (1 - smoothing) + smoothing / 3)
    gradients = np.einsum("bci,bc->bi", jacobian, residual)
    empirical = along(gradients.T @ gradients / len(x))
    np.testing.assert_allclose(products(probe, operator="fisher_empirical"), empirical, atol=1e-11)


def test_monte_carlo_fisher_tends_to_the_gauss_newton_matrix():
    model, x, y = make()
    probe = probe_of(model, x, y)
    ggn = products(probe, operator="ggn")
    few, many = (np.abs(products(probe, operator="fisher_mc", n_samples=n) - ggn).max() for n in (4, 4000))
    # the error falls with the root of the samples: by 31 here, asked for is 8
    assert many < few / 8
    assert many < 0.05 * np.abs(ggn).max()


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher_mc", "fisher_empirical"])
def test_splitting_changes_nothing(operator):
    model, x, y = make()
    whole = products(probe_of(model, x, y, size=12, weight_decay=0.1), operator=operator)
    # batches of 4 and micro-batches of 3: sums in another order, float64
    for probe, micro in (
        (probe_of(model, x, y, size=4, weight_decay=0.1), None),
        (probe_of(model, x, y, 12, weight_decay=0.1), 3),
    ):
        np.testing.assert_allclose(products(probe, operator=operator, micro_batch=micro), whole, atol=1e-12)


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher_mc", "fisher_empirical"])
def test_symmetric_and_linear(operator):
    model, x, y = make("transformer")
    with curvatures(probe_of(model, x, y, weight_decay=0.1), operator=operator) as made:
        c = made.mean()
        u, v = torch.randn(2, c.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert abs(float(u @ c(v) - v @ c(u))) < 1e-11
        assert torch.allclose(c(2 * u - 3 * v), 2 * c(u) - 3 * c(v), atol=1e-11)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "both"])
def test_either_end(which):
    model, x, y = make("transformer")
    probe = probe_of(model, x, y, weight_decay=0.05)
    spectrum = np.linalg.eigvalsh(dense_hessian(model, x, y, probe.objective))
    ends = {"LM": by_magnitude(spectrum, 4), "LA": spectrum[::-1][:4], "SA": spectrum[:4]}
    expected = np.concatenate([ends["LA"], ends["SA"]]) if which == "both" else ends[which]
    result = vs.hessian_eigenvalues(probe, k=4, which=which)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-3)
    assert result.converged.all()
    assert result.card.n_images == 12


def test_eigenvectors_residuals_and_a_subset():
    model, x, y = make()
    probe = probe_of(model, x, y, weight_decay=0.05)
    dense = dense_hessian(model, x, y, probe.objective)
    result = vs.hessian_eigenvalues(probe, k=3, eigenvectors=True)
    true = [np.linalg.norm(dense @ v - value * v) for v, value in zip(result.eigenvectors, result.eigenvalues)]
    np.testing.assert_allclose(result.residuals, true, atol=1e-9)
    part = vs.hessian_eigenvalues(probe, k=3, parameters="layer:head", tol=1e-6)
    size = model.head.weight.numel() + 3
    np.testing.assert_allclose(part.eigenvalues, by_magnitude(np.linalg.eigvalsh(dense[-size:, -size:]), 3), rtol=1e-6)
    assert part.parameter_names == ("head.weight", "head.bias")
    assert part.card.parameters == "layer:head"


def test_the_power_solver_finds_the_first_eigenvalue():
    model, x, y = make()
    probe = probe_of(model, x, y)
    spectrum = np.linalg.eigvalsh(dense_hessian(model, x, y, probe.objective))
    result = vs.hessian_eigenvalues(probe, k=2, solver="power")
    # its rule watches the change of the value, no bound on its error: a per cent is what it gives here
    np.testing.assert_allclose(result.eigenvalues[0], by_magnitude(spectrum, 1)[0], rtol=1e-2)
    assert (np.abs(result.eigenvalues[:, None] - spectrum).min(1) <= result.residuals + 1e-9).all()
    with pytest.raises(ValueError, match="which='LM' .* received which='SA'"):
        vs.hessian_eigenvalues(probe, solver="power", which="SA")


def test_the_model_comes_back_and_dropout_is_off():
    model, x, y = make("transformer")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = vs.hessian_eigenvalues(probe_of(model, x, y), k=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert result.card.solver["dropout"] == "off (1 dropout or drop-path modules)"


def test_refusals():
    model, x, y = make()
    probe = probe_of(model, x, y)
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=f"between 1 and {size} eigenvalues .* received k={size + 1}"):
        vs.hessian_eigenvalues(probe, k=size + 1)
    with pytest.raises(ValueError, match="solver to be one of lanczos, power, received 'qr'"):
        vs.hessian_eigenvalues(probe, solver="qr")
    with pytest.raises(ValueError, match="operator to be one of .* received 'jacobian'"):
        vs.hessian_eigenvalues(probe, operator="jacobian")
    with pytest.raises(ValueError, match="dtype to be float32, float64 or None, received 'bfloat16'"):
        vs.hessian_eigenvalues(probe, dtype="bfloat16")
    with pytest.raises(ValueError, match="received 'layer:nothing'; there are: conv, head, norm"):
        vs.hessian_eigenvalues(probe, parameters="layer:nothing")
    with pytest.raises(ValueError, match="micro_batch=None with bn='batch'"):
        vs.hessian_eigenvalues(probe, bn="batch", micro_batch=2)
    with pytest.raises(ValueError, match="trainable parameters, received Flatten without any"):
        vs.hessian_eigenvalues(vs.Probe(torch.nn.Flatten(), [(x, y)]))
    with pytest.raises(ValueError, match="batch 0 on the model's device cpu, received meta"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x.to("meta"), y.to("meta"))]))
    with torch.inference_mode():
        frozen = make()[0]
    with pytest.raises(ValueError, match="ordinary parameters"):
        vs.hessian_eigenvalues(vs.Probe(frozen, [(x, y)]))
    with pytest.raises(NumericalError, match="not finite on images 0 to 4"):
        vs.hessian_eigenvalues(probe_of(model, x * float("inf"), y))
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="parameter 'head.bias' holds 3 NaN"):
        vs.hessian_eigenvalues(probe)


def test_as_many_values_as_are_asked_for() -> None:
    """More than ``max_products``: the search makes a product for each, and the whole spectrum is exact."""
    x, y = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.arange(6) % 3
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    ).double()
    probe = probe_of(model, x, y)
    size = sum(p.numel() for p in model.parameters())
    expected = np.linalg.eigvalsh(dense_hessian(model, x, y, vs.Objective()))
    result = vs.hessian_eigenvalues(probe, k=size, max_products=20)
    np.testing.assert_allclose(np.sort(result.eigenvalues), expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(("seed", "which"), [(2, "SA"), (27, "LM")])
def test_a_small_space_is_searched_longer(seed: int, which: str) -> None:
    """With three confirming products these searches pass over one of the five eigenvalues."""
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.GELU()]
    model = torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(8, 3, 9, 9, dtype=torch.float64), torch.randint(0, 3, (8,))
    probe = probe_of(model, x, y, size=4)
    spectrum = np.linalg.eigvalsh(dense_hessian(model, x, y, vs.Objective()))
    expected = spectrum[np.argsort(-abs(spectrum))][:5] if which == "LM" else spectrum[:5]
    np.testing.assert_allclose(vs.hessian_eigenvalues(probe, which=which).eigenvalues, expected, rtol=1e-3)


def test_frozen_parameters_are_another_subset() -> None:
    x, y = torch.randn(4, 3, 4, 4), torch.arange(4) % 3
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    probe = probe_of(model, x, y)
    cards = [[vs.hessian_trace(probe, n_vectors=1).card, vs.loss_slice(probe, n=2).card]]
    model[0].requires_grad_(False)
    cards.append([vs.hessian_trace(probe, n_vectors=1).card, vs.loss_slice(probe, n=2).card])
    for whole, part in zip(*cards):
        assert whole is not None
        assert part is not None
        assert (whole.parameters, part.parameters) == ("all", "trainable")
        assert whole.differences(part) == ["parameters"]
    model[2].bias.requires_grad_(False)
    card = vs.hessian_trace(probe, n_vectors=1, parameters="*.weight").card
    assert card is not None
    assert card.parameters == "*.weight (trainable)"
