"""Moments of the gradients of images against loops over images in float64 and closed forms of linear regression."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks import forms_of_batches as forms
from tests.fixtures.networks.small_networks import data_of, model_of
from tests.fixtures.oracles.hessian_oracle import dense_hessian, make
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.gradient_noise._noise_statistics import effective_images, noise_statistics

pytestmark = pytest.mark.filterwarnings("ignore:gradient_noise")  # few images


def image_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]], objective: vs.Objective) -> Tensor:
    """Return the gradient of the loss of each image ``(n, size)``, one backward pass an image."""
    rows = []
    for x, y in batches:
        for i in range(len(y)):
            loss = objective.data_loss(model(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def assert_moments(result: Any, row: int, g: Tensor) -> None:
    """Compare with sums over all pairs of images; tolerances are rounding of float64."""
    n = len(g)
    trace = float(g.var(0).sum())
    gram = g @ g.T
    square = float(gram.sum() - gram.trace()) / (n * (n - 1))
    unit = g / g.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    assert result.trace_covariance[row] == pytest.approx(trace, rel=1e-10)
    assert result.gradient_square_norm[row] == pytest.approx(square, rel=1e-8, abs=1e-12)
    expected = trace / square if square > 0 else float("nan")
    assert result.noise_scale[row] == pytest.approx(expected, rel=1e-8, nan_ok=True)
    assert result.coherence[row] == pytest.approx(square * n / float(gram.trace()), rel=1e-8, abs=1e-12)
    assert result.m_coherence[row] == pytest.approx(float(gram.sum() / gram.trace()), rel=1e-10)
    assert result.mean_cosine[row] == pytest.approx(float(cosines.sum() - n) / (n * (n - 1)), abs=1e-12)
    np.testing.assert_allclose(result.square_norms[row], gram.diagonal(), rtol=1e-10)
    variance = g.var(0)
    varies = variance > 1e-25
    signal = g.mean(0)[varies] ** 2 / variance[varies] - 1 / n
    assert result.gsnr[row] == pytest.approx(float(signal.mean()), rel=1e-8)


@pytest.mark.parametrize(
    "name",
    ["small convnet", "small vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "vit_tiny"))],
)
def test_moments_are_those_of_a_loop_over_images(name: str) -> None:
    model, batches = model_of(name), data_of(name, n=7)
    probe = vs.Probe(model, batches, vs.Objective(weight_decay=0.1))
    result = vs.gradient_noise(probe, micro_batch=3)
    g = image_gradients(model, batches, probe.objective).detach()
    assert_moments(result, 0, g)
    kinds = vs.models.structure.parameter_groups.parameter_kinds(model, batches[0][0])
    columns = np.repeat([kinds[n] for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()])
    assert set(result.groups[1:]) == set(columns)
    for row, group in enumerate(result.groups[1:], 1):
        assert result.n_parameters[row] == (columns == group).sum()
        assert_moments(result, row, g[:, torch.from_numpy(columns == group)])


@pytest.mark.filterwarnings("ignore:Network does not run")  # batches of more than images
@pytest.mark.parametrize("form", ["mse", "bce", "own loss", "dict batch", "triple"])
def test_every_loss_and_batch_gives_the_moments_of_its_images(form: str) -> None:
    probe = forms.probe(form)
    rows = []
    with probe.guard(second_order=True) as model:
        for x, y in probe.iter_batches():
            for i in range(len(y)):
                loss = probe.objective.data_loss(model(x[i : i + 1]), y[i : i + 1])
                rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert_moments(vs.gradient_noise(probe), 0, torch.stack(rows))


def regression_probe(n: int = 4000, noise: float = 0.5, seed: int = 0) -> tuple[vs.Probe, dict[str, float]]:
    """Return a linear regression with Gaussian inputs, and the moments of its gradients in closed form.

    With the error e = w - w* and unit Gaussian inputs x the gradient of ``(w x - t)^2`` is ``2 (x x^T e - x noise)``: its mean is
    ``2 e``, its second moment has the trace ``4 ((d + 2) |e|^2 + d noise^2)``, and the Hessian is 2 I.
    """
    generator = torch.Generator().manual_seed(seed)
    d = 6
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    target = torch.randn(d, generator=generator, dtype=torch.float64)
    y = x @ target + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double()
    error = torch.linspace(0.2, 0.7, d, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_((target + error)[None])
    square = 4 * float(error @ error)
    trace = 4 * ((d + 2) * float(error @ error) + d * noise**2) - square
    probe = vs.Probe(model, [(x[:2000], y[:2000, None]), (x[2000:], y[2000:, None])], vs.Objective(loss="mse"))
    return probe, {"square": square, "trace": trace}


def test_linear_regression_has_its_closed_form() -> None:
    """The intervals hold it; they are 95 % ones, stretched to four standard errors."""
    probe, exact = regression_probe()
    result = vs.gradient_noise(probe, n_hessian_vectors=30)
    scale = exact["trace"] / exact["square"]
    low, high = 1 / result.noise_scale_interval[0]
    half = 2 * abs(high - low) / 2  # 1.96 standard errors twice
    assert abs(1 / result.noise_scale[0] - 1 / scale) < half
    assert half < 0.2 / scale
    coherence = exact["square"] / (exact["square"] + exact["trace"])
    assert abs(result.coherence[0] - coherence) < np.ptp(result.coherence_interval[0])
    # the Hessian is 2 I but for the sampling of its 4000 images: both noise scales are equal but for that and the random signs
    relative = result.trace_hessian_covariance_error / result.trace_hessian_covariance
    assert abs(result.hessian_noise_scale / result.noise_scale[0] - 1) < 4 * relative * (
        1 + result.noise_scale[0] / 4000
    )
    x = torch.cat([x for x, _ in probe.batches])
    y = torch.cat([y for _, y in probe.batches])
    mean = 2 * ((probe.model(x) - y) * x).mean(0).detach()
    curvature = float(mean @ (2 * x.T @ x / len(x)) @ mean)
    assert result.gradient_curvature + result.trace_hessian_covariance / 4000 == pytest.approx(curvature, rel=1e-10)


def test_the_noise_scale_with_the_hessian_is_that_of_dense_matrices() -> None:
    model, x, y = make("conv", n=10)
    result = vs.gradient_noise(vs.Probe(model, [(x[:6], y[:6]), (x[6:], y[6:])]), n_hessian_vectors=60)
    dense = torch.from_numpy(dense_hessian(model, x, y, vs.Objective()))
    g = image_gradients(model, [(x, y)], vs.Objective()).detach()
    centered = g - g.mean(0)
    trace = float((centered @ dense * centered).sum() / 9)
    assert abs(result.trace_hessian_covariance - trace) < 4 * result.trace_hessian_covariance_error
    mean = g.mean(0)
    curvature = float(mean @ dense @ mean) - result.trace_hessian_covariance / 10
    assert result.gradient_curvature == pytest.approx(curvature, rel=1e-9)


@pytest.mark.parametrize(("sizes", "micro_batch"), [([6, 4], None), ([4, 4, 2], 3), ([10], 4)])
def test_moments_with_the_hessian_do_not_depend_on_batches(sizes: list[int], micro_batch: int | None) -> None:
    """Each image has signs of its own: those of other images would correlate what is averaged."""
    model, x, y = make("conv", n=10)
    whole = vs.gradient_noise(vs.Probe(model, [(x, y)]), n_hessian_vectors=3)
    probe = vs.Probe(model, list(zip(x.split(sizes), y.split(sizes))))
    parts = vs.gradient_noise(probe, n_hessian_vectors=3, micro_batch=micro_batch)
    assert parts.trace_hessian_covariance == pytest.approx(whole.trace_hessian_covariance, rel=1e-9)
    error = whole.trace_hessian_covariance_error
    assert parts.trace_hessian_covariance_error == pytest.approx(error, rel=1e-9)
    assert parts.gradient_curvature == pytest.approx(whole.gradient_curvature, rel=1e-9)


def test_jackknife_ends_are_those_of_leaving_images_out() -> None:
    rng = np.random.default_rng(0)
    g = rng.standard_normal((40, 5)) + 1.0

    def summaries(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        mean, total = rows.mean(0), unit.sum(0)
        parts = (rows**2).sum(1), mean @ mean, rows @ mean, total @ total, unit @ total
        return tuple(np.array(part)[..., None] for part in parts)

    result = noise_statistics(*summaries(g))
    left = [noise_statistics(*summaries(np.delete(g, i, 0))) for i in range(40)]
    from scipy import stats

    for name, values in {
        "coherence": [s.coherence[0] for s in left],
        "mean_cosine": [s.mean_cosine[0] for s in left],
        "noise_scale": [1 / s.noise_scale[0] for s in left],
    }.items():
        error = np.sqrt(39 / 40 * np.sum((np.array(values) - np.mean(values)) ** 2))
        center = getattr(result, name)[0] if name != "noise_scale" else 1 / result.noise_scale[0]
        ends = center + stats.t.ppf([0.025, 0.975], 39) * error
        ends = 1 / ends[::-1] if name == "noise_scale" else ends
        np.testing.assert_allclose(getattr(result, name + "_interval")[0], ends, rtol=1e-10)


def test_gradients_without_a_mean_have_an_open_interval() -> None:
    g = np.random.default_rng(1).standard_normal((160, 4))
    mean = g.mean(0)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    total = unit.sum(0)
    parts = (g**2).sum(1), mean @ mean, g @ mean, total @ total, unit @ total
    result = noise_statistics(*(np.array(part)[..., None] for part in parts))
    assert np.isinf(result.noise_scale_interval[0, 1])
    assert np.isfinite(result.noise_scale_interval[0, 0])


def test_a_few_long_gradients_have_no_interval_of_the_noise_scale() -> None:
    square_norms = np.r_[np.full(5, 100.0), np.full(195, 0.01)][:, None]
    assert effective_images(square_norms)[0] == pytest.approx(5, rel=0.01)
    nothing = np.zeros((200, 1))
    result = noise_statistics(square_norms, np.ones(1), nothing, np.full(1, 50.0), nothing)
    assert np.isnan(result.noise_scale_interval).all()
    assert np.isfinite(result.mean_cosine_interval).all()


def test_equal_gradients_are_coherent_and_without_noise() -> None:
    model, x, y = make("conv", n=1)
    probe = vs.Probe(model, [(x.repeat(5, 1, 1, 1), y.repeat(5))])
    result = vs.gradient_noise(probe)
    np.testing.assert_allclose(result.coherence, 1.0)
    np.testing.assert_allclose(result.mean_cosine, 1.0)
    np.testing.assert_allclose(result.m_coherence, 5.0)
    np.testing.assert_allclose(result.noise_scale, 0.0, atol=1e-12)


def test_images_without_a_label_are_left_out() -> None:
    model, x, y = make("conv", n=10)
    marked = torch.where(torch.arange(10) % 3 == 0, -100, y)
    result = vs.gradient_noise(vs.Probe(model, [(x[:4], marked[:4]), (x[4:], marked[4:])]), n_hessian_vectors=2)
    expected = vs.gradient_noise(vs.Probe(model, [(x[marked >= 0], y[marked >= 0])]), n_hessian_vectors=2)
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray | float):
            np.testing.assert_allclose(getattr(result, name), value, atol=1e-12, err_msg=name)


class DataDependent(nn.Module):
    """A network with a branch on values, which `vmap` cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum().item() < 1e9 else self.head(-x)


def test_networks_that_vmap_cannot_take_are_differentiated_image_by_image(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x, y = DataDependent().double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    with caplog.at_level(logging.WARNING, logger="vitscope"):
        result = vs.gradient_noise(vs.Probe(model, [(x, y)]))
    assert "gradients of single images are computed one after the other: torch.func.vmap fails with" in caplog.text
    assert_moments(result, 0, image_gradients(model, [(x, y)], vs.Objective()))


class Centered(nn.Module):
    """A layer in which images of a batch influence each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")  # noticed, then refused
@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            nn.BatchNorm1d(3, track_running_stats=False),
            "received '1' that uses those of the batch.*track_running_stats=True",
        ),
        (Centered(), "images of a batch influence each other"),
    ],
)
def test_images_that_influence_each_other_are_refused(layer: nn.Module, text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), layer).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    with pytest.raises(ValueError, match=text) as error:
        vs.gradient_noise(vs.Probe(model, [(x, y)]))
    assert "\n" not in str(error.value)


def test_what_it_needs_is_said() -> None:
    model, x, y = make("conv", n=4)
    with pytest.raises(ValueError, match="at least 3 images with a label for gradient_noise, received 2"):
        vs.gradient_noise(vs.Probe(model, [(x[:2], y[:2])]))
    mean_alone = vs.Objective(loss=lambda z, t: (z.sum(1) - t).square().mean())
    with pytest.raises(ValueError, match="gradient_noise compares the losses of images and needs one value per image"):
        vs.gradient_noise(vs.Probe(model, [(x, y)], mean_alone))
    with pytest.warns(NullWarning, match="the intervals"):
        vs.gradient_noise(vs.Probe(model, [(x, y)]))


def two_batches() -> dict[str, np.ndarray]:
    model, x, y = make("conv", n=160)
    probe = vs.Probe(model, [(x[:90], y[:90]), (x[90:], y[90:])])
    result = vs.gradient_noise(probe, n_hessian_vectors=2)
    return {name: value for name, value in vars(result).items() if isinstance(value, np.ndarray | float)}


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    expected = two_batches()
    assert np.isfinite(expected["mean_cosine_interval"]).all()
    for numbers in results_of_ranks(two_batches, tmp_path):
        for name, value in numbers.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_figure_has_a_row_for_each_group() -> None:
    model, batches = model_of("small vit"), data_of("small vit", n=7)
    result = vs.gradient_noise(vs.Probe(model, batches))
    figure = vs.plot({"a": result, "b": result})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["All", "Stem", "MSA", "MLP", "Head"]
    assert all(ax.has_data() for ax in figure.axes)
