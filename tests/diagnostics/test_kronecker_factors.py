"""Kronecker factors of curvlinops against moments of inputs and gradients in float64; the error where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.small_networks import data_of, model_of
from vitscope.diagnostics.kronecker.kronecker_factors import _decay, _participation

needs_curvlinops = pytest.mark.skipif(importlib.util.find_spec("curvlinops") is None, reason="needs curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore:kronecker_factors", "ignore:.*torch.jit.script", "ignore:Sequential")


def two_layers() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3


@needs_curvlinops
def test_factors_are_moments_of_inputs_and_gradients() -> None:
    """A is the mean of a a^T of a layer's inputs; B the mean of J^T (diag p - p p^T) J with the Jacobian J in its outputs."""
    model, x, y = two_layers()
    result = vs.kronecker_factors(vs.Probe(model, [(x[:8], y[:8]), (x[8:], y[8:])]))
    assert result.layers == ("0", "2")
    first = model[0](x)
    hidden = first.tanh()
    p = model(x).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # (n, 3, 3)
    jacobian = model[2].weight[None] * (1 - hidden**2)[:, None]  # (n, 3, 4)
    expected = [
        (x.T @ x / 20, (jacobian.transpose(1, 2) @ middle @ jacobian).mean(0)),
        (hidden.T @ hidden / 20, middle.mean(0)),
    ]
    for i, (a, b) in enumerate(expected):
        for factor, values, sizes, ranks in (
            (a, result.input_eigenvalues, result.input_sizes, result.input_effective_ranks),
            (b, result.output_eigenvalues, result.output_sizes, result.output_effective_ranks),
        ):
            eigenvalues = torch.linalg.eigvalsh(factor).flip(0).detach().numpy()
            assert sizes[i] == len(eigenvalues)
            np.testing.assert_allclose(values[i, : len(eigenvalues)], eigenvalues, atol=1e-12)
            assert np.isnan(values[i, len(eigenvalues) :]).all()
            assert ranks[i] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
        assert result.traces[i] == pytest.approx(float((a.trace() * b.trace()).detach()))
    assert result.n_uncovered == 7


@needs_curvlinops
def test_kinds_and_uncovered_parameters_of_a_transformer() -> None:
    model, batches = model_of("small vit"), data_of("small vit", n=7)
    result = vs.kronecker_factors(vs.Probe(model, batches))
    assert set(result.groups) == {"stem", "msa", "mlp", "head"}
    assert np.isfinite(result.traces).all()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert result.n_uncovered == sum(p.numel() for p in model.parameters()) - weights
    figure = vs.plot({"a": result, "b": result})
    assert len(figure.axes) == 6


@needs_curvlinops
def test_the_trace_of_one_image_is_that_of_the_gauss_newton_block() -> None:
    """For one image and a layer without shared positions K-FAC is exact."""
    model, x, y = two_layers()
    probe = vs.Probe(model, [(x[:1], y[:1])])
    result = vs.kronecker_factors(probe)
    for layer, trace in zip(result.layers, result.traces):
        diagonal = vs.hessian_diagonal(probe, method="exact", operator="ggn", parameters=f"{layer}.weight")
        assert trace == pytest.approx(diagonal.trace, rel=1e-10)


def test_decay_and_participation_of_given_spectra() -> None:
    values = 3.0 * np.arange(1, 40) ** -1.7
    assert _decay(values, 1e-2).exponent == pytest.approx(1.7)
    assert _decay(values, 1e-2).n_points == int((values >= 0.03).sum())
    assert _decay(0.5 ** np.arange(9), 2.0**-5).n_points == 6  # at least the share, and so the share itself
    assert np.isnan(_decay(values, 0.5).exponent)
    assert np.isnan(_decay(np.zeros(5), 0.5).exponent)
    assert _participation(np.ones(7)) == pytest.approx(7)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = two_layers()
    probe = vs.Probe(model, [(x, y)])
    options: list[tuple[dict[str, Any], str]] = [
        ({"fisher": "exact"}, "Expected fisher to be one of type-2, mc, empirical, received 'exact'"),
        ({"approximation": "sum"}, "Expected approximation to be one of expand, reduce, received 'sum'"),
    ]
    for given, text in options:
        with pytest.raises(ValueError, match=text):
            vs.kronecker_factors(probe, **given)
    with pytest.raises(ValueError, match="kronecker_factors needs logits"):
        vs.kronecker_factors(vs.Probe(model, [(x, torch.randn(20, 3))], vs.Objective(loss="mse")))
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ValueError, match=r"kronecker_factors needs curvlinops.*pip install 'vitscope\[kfac\]'"):
        vs.kronecker_factors(probe)


@needs_curvlinops
@pytest.mark.parametrize("kind", ["smoothed", "soft"])
def test_empirical_factors_are_of_the_stated_targets(kind: str) -> None:
    """B of the last layer is the mean of (p - t) (p - t)^T with the targets t that the card states."""
    model, x, y = two_layers()
    smoothing = 0.3 if kind == "smoothed" else 0.0
    targets = nn.functional.one_hot(y, 3).double() * (1 - smoothing) + smoothing / 3
    if kind == "soft":
        targets = torch.rand(20, 3, dtype=torch.float64).softmax(1)
    given = y if kind == "smoothed" else targets
    probe = vs.Probe(model, [(x[:8], given[:8]), (x[8:], given[8:])], vs.Objective(label_smoothing=smoothing))
    result = vs.kronecker_factors(probe, fisher="empirical")
    residuals = model(x).softmax(1).detach() - targets
    expected = torch.linalg.eigvalsh(residuals.T @ residuals / 20).flip(0).numpy()
    np.testing.assert_allclose(result.output_eigenvalues[1, :3], expected, atol=1e-12)
    assert result.card is not None
    assert result.card.loss == f"cross entropy, {'soft targets as given' if kind == 'soft' else 'label smoothing 0.3'}"


@needs_curvlinops
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_images_without_a_label_are_left_out(fisher: str) -> None:
    model, x, y = two_layers()
    counts = torch.arange(20) % 4 != 0
    marked = torch.where(counts, y, -100)
    found = vs.kronecker_factors(vs.Probe(model, [(x[:8], marked[:8]), (x[8:], marked[8:])]), fisher=fisher)
    expected = vs.kronecker_factors(vs.Probe(model, [(x[counts], y[counts])]), fisher=fisher)
    np.testing.assert_allclose(found.input_eigenvalues, expected.input_eigenvalues, atol=1e-12)
    np.testing.assert_allclose(found.output_eigenvalues, expected.output_eigenvalues, atol=1e-12)


class SamePadding(nn.Conv2d):
    """A convolution that pads its input itself, as those of EfficientNets do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map of the size of the input's."""
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class UsedTwice(nn.Module):
    """A layer that a pass calls twice, one that it never calls, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.first, self.second = (nn.Linear(5, 5) for _ in range(4))
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, 3)``."""
        return self.head(self.second(self.first(self.twice(self.twice(x)).tanh())))


@needs_curvlinops
@pytest.mark.filterwarnings("ignore:the outputs in eval mode do not depend on never")
def test_layers_that_the_formula_does_not_fit_are_not_covered() -> None:
    """Factors were twice as large for the first, missed the padding of the second, and the rest raised NotImplementedError."""
    torch.manual_seed(0)
    y = torch.arange(8) % 3
    result = vs.kronecker_factors(vs.Probe(UsedTwice(), [(torch.randn(8, 5), y)]))
    assert result.layers == ("head",)
    padded = nn.Sequential(SamePadding(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    result = vs.kronecker_factors(vs.Probe(padded, [(torch.randn(8, 3, 4, 4), y)]))
    assert result.layers == ("3",)
    assert result.n_uncovered == 3 * 4 * 9 + 4 + 3
    made = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    assert vs.kronecker_factors(vs.Probe(made, [(torch.randn(8, 5), y)])).layers == ("1",)
