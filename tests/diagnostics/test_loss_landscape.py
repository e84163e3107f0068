"""The landscape against bowls of known curvature, closed forms of L2, and the model it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, Normalize
from torch import nn

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, batches, bowl, bowl_at, real, snapshot
from vitscope.core.weight_space import recalibrate
from vitscope.linalg.weights.directions import filter_parameters, normalize, random_direction
from vitscope.runtime import stop_flag

NAME = "0.weight"


def test_a_bowl_has_its_known_values_everywhere():
    probe = bowl()
    w = probe.model[0].weight.detach().clone()
    d1, d2 = (random_direction({NAME: w}, seed)[NAME] for seed in (0, 1))
    r = vs.loss_landscape(probe, directions=[{NAME: d1}, d2.flatten()], span=2.0, n=5)
    assert r.directions == "given"
    assert r.normalization == "none"
    assert r.x.tolist() == [-2, -1, 0, 1, 2]
    expected = [[bowl_at(w + a * d1 + b * d2) for b in r.y] for a in r.x]
    np.testing.assert_allclose(r.nll, expected, rtol=1e-13)  # float64 rounding
    x = torch.cat([x for x, _ in batches()])
    curvature = float((x @ d1.T).square().sum(dim=1).mean())
    np.testing.assert_allclose(np.diff(r.nll[:, 2], 2), curvature, rtol=1e-10)


def test_the_center_is_the_objective():
    probe = real()
    r = vs.loss_landscape(probe, n=3)
    with probe.guard() as model:
        x, y = (torch.cat(parts) for parts in zip(*probe.batches))
        whole = float(probe.objective(model, x, y))
        right = float((model(x).argmax(1) == y).double().mean())
    assert r.nll[1, 1] + r.l2_half_sq[1, 1] == pytest.approx(whole, rel=1e-12)
    assert r.accuracy[1, 1] == right
    assert r.scalars()["nll_center"] == r.nll[1, 1]


def test_l2_surfaces_are_those_of_the_moved_weights():
    probe = real(weight_decay=0.3)
    d = [random_direction(probe.parameters(), seed) for seed in (0, 1)]
    r = vs.loss_landscape(probe, directions=d, n=3)
    for i, j in np.ndindex(3, 3):
        moved = {n: p.detach() + r.x[i] * d[0][n] + r.y[j] * d[1][n] for n, p in probe.parameters().items()}
        assert r.l2_half_sq[i, j] == pytest.approx(float(probe.objective.l2_half_sq(moved)), rel=1e-12)
        assert r.l2_sum_norm[i, j] == pytest.approx(float(probe.objective.l2_sum_norm(moved)), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")  # logits that sum to 1
def test_orthogonal_directions_give_the_closed_form_of_sum_norm():
    """A + B sqrt(1 + r^2): the released surface measures the distance from the origin, not the loss."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        model[1].bias.fill_(0.5)
    first = {"0.weight": torch.tensor([[0.0, 3.0], [0.0, 0.0]]), "1.weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
    second = {"0.weight": torch.tensor([[0.0, 0.0], [3.0, 0.0]]), "1.weight": torch.tensor([[0.0, 2.0], [0.0, 0.0]])}
    probe = vs.Probe(model, batches(shape=(2,), classes=2), vs.Objective(weight_decay=0.05))
    r = vs.loss_landscape(probe, directions=[first, second], n=5)
    radius = np.hypot(r.x[:, None], r.y[None, :])
    np.testing.assert_allclose(r.l2_sum_norm, 0.05 * (np.sqrt(0.5) + 5 * np.sqrt(1 + radius**2)), rtol=1e-14)
    np.testing.assert_allclose(r.l2_half_sq, 0.025 * (0.5 + 13 * (1 + radius**2)), rtol=1e-14)


@pytest.mark.parametrize("bn", ["eval", "recalibrate"])
def test_model_is_given_back_bit_identical(bn: str):
    probe = real()
    probe.model.train()
    before = snapshot(probe.model)
    vs.loss_landscape(probe, n=3, bn=bn)
    assert_untouched(probe.model, before)
    assert all(m.training for m in probe.model.modules())
    assert probe.model[1].momentum == 0.1


def test_model_is_given_back_after_termination_and_only_missing_points_are_computed():
    probe, partial = real(), {}
    before, whole = snapshot(probe.model), vs.loss_landscape(probe, n=3)

    class Stopping(dict):
        def __setitem__(self, key, row):
            super().__setitem__(key, row)
            if len(self) == 4:
                stop_flag.request(15)

    stopped = Stopping()
    with pytest.raises(stop_flag.Interrupted):
        vs.loss_landscape(probe, n=3, partial=stopped)
    stop_flag.clear()
    assert_untouched(probe.model, before)
    assert len(stopped) == 4
    partial, passes = dict(stopped), []
    handle = probe.model.register_forward_hook(lambda *_: passes.append(1))
    resumed = vs.loss_landscape(probe, n=3, partial=partial)
    handle.remove()
    assert len(passes) == 5 * len(probe.batches)
    for field in ("nll", "accuracy", "ece", "l2_half_sq"):
        assert np.array_equal(getattr(resumed, field), getattr(whole, field))


def test_model_is_given_back_after_an_error_in_it():
    probe = real()
    before, calls = snapshot(probe.model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("out of memory")

    probe.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        vs.loss_landscape(probe, n=3, bn="recalibrate")
    assert_untouched(probe.model, before)


def test_recalibration_is_the_average_of_the_batches_statistics():
    probe = real()
    with probe.guard() as model:
        recalibrate(model, iter(probe.batches))
        maps = [model[0](x) for x, _ in probe.batches]
        means = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        variances = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
        torch.testing.assert_close(model[1].running_mean, means, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model[1].running_var, variances, rtol=1e-12, atol=1e-14)
        assert not model[1].training


class Exponential(nn.Module):
    """Logits that overflow float64 where the weights are large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x @ self.weight.T)


def overflowing():
    """Measure a plane whose outer two columns of three overflow: |x @ w| is far above 709 there."""
    d = [{"weight": torch.full((4, 6), 1e5, dtype=torch.float64)}, np.linspace(0, 1e-2, 24)]
    return vs.loss_landscape(vs.Probe(Exponential(), batches()), directions=d, n=3)


def test_points_that_are_not_finite_are_counted():
    r = overflowing()
    assert r.n_nonfinite == 6
    assert np.isfinite(r.nll[1]).all()
    assert np.isfinite(r.minimum()).all()
    assert r.scalars()["nonfinite_points"] == 6


def test_frozen_and_ignored_parameters_stay_and_models_without_batchnorm_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)).double()
    model[0].requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda m, *_: seen.append(snapshot(m)))
    before = snapshot(model)
    r = vs.loss_landscape(vs.Probe(model, batches()), n=3, bn="recalibrate")
    assert r.normalization == "filter"
    moved = {name for state in seen for name in before if not torch.equal(state[name], before[name])}
    assert moved == {"3.weight"}
    assert_untouched(model, before)


class Tied(nn.Module):
    """A depthwise convolution, and one matrix that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.depthwise(x).mean((2, 3))).tanh())


def test_tied_parameters_move_together_and_count_once():
    torch.manual_seed(1)
    model = Tied().double()
    probe = vs.Probe(model, batches(shape=(3, 4, 4), classes=3), vs.Objective(weight_decay=0.1))
    before = snapshot(model)
    assert model.second.weight is model.first.weight
    r = vs.loss_landscape(probe, n=3)
    assert_untouched(model, before)
    d = [normalize(random_direction(probe.parameters(), 0, k), probe.parameters(), "filter", filter_parameters(model))
         for k in (0, 1)]  # fmt: skip
    assert set(d[0]) == {"depthwise.weight", "first.weight"}
    moved = Tied().double()
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.copy_(before[name] + r.x[0] * d[0][name] + r.y[2] * d[1][name])
        x, y = (torch.cat(parts) for parts in zip(*probe.batches))
        assert r.nll[0, 2] == pytest.approx(float(nn.functional.cross_entropy(moved(x), y)), rel=1e-12)
    squares = sum(float(w.detach().square().sum()) for w in (moved.depthwise.weight, moved.first.weight))
    assert r.l2_half_sq[0, 2] == pytest.approx(0.05 * squares, rel=1e-12)


def test_rise_at_the_border_is_over_what_is_finite():
    r = overflowing()
    middle = r.nll[1]  # the only finite row: its ends are on the border
    assert r.rise_at_border() == pytest.approx((middle[0] + middle[2]) / 2 - middle.min(), rel=1e-12)
    assert r.rise_at_border(np.full((3, 3), 2.0)) == pytest.approx(r.rise_at_border(), rel=1e-12)
    whole = vs.loss_landscape(bowl(weight_decay=0.2), n=3)
    total = whole.nll + whole.l2_sum_norm
    border = np.delete(total.ravel(), 4)
    assert whole.scalars()["nll_l2_sum_norm_rise_at_border"] == pytest.approx(border.mean() - total.min(), rel=1e-12)


def test_official_preset():
    r = vs.loss_landscape(real(), n=3, preset="official")
    by_hand = vs.loss_landscape(
        real(), n=3, normalization="filter_official", ignore=["one_dim", "pos_embed|relative_position"]
    )
    assert r.preset == "official"
    assert np.array_equal(r.nll, by_hand.nll)
    assert not np.array_equal(r.nll, vs.loss_landscape(real(), n=3).nll)


def test_bfloat16_states_its_error():
    probe = real()
    probe.model.float()
    probe.batches = [(x.float(), y) for x, y in probe.batches]
    full, half = vs.loss_landscape(probe, n=3), vs.loss_landscape(probe, n=3, dtype="bfloat16")
    difference = np.abs(full.nll - half.nll)[[0, 0, 2, 2, 1], [0, 2, 0, 2, 1]].max()
    assert half.dtype_error == pytest.approx(difference, rel=1e-6)
    assert 0 < half.dtype_error < 0.05  # eight bits of mantissa, losses near 1
    assert full.dtype_error is None
    assert half.card is not None
    assert half.card.dtype == "bfloat16"
    assert len(np.unique(half.nll)) == 9  # a stale cache of cast weights would repeat values


def test_float64_on_a_float32_model():
    probe = real()
    probe.model.float()
    before = snapshot(probe.model)
    r = vs.loss_landscape(probe, n=3, dtype="float64")
    assert_untouched(probe.model, before)
    assert probe.model[0].weight.dtype == torch.float32
    assert r.card is not None
    assert r.card.dtype == "float64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "randm"}, "random, eigenvectors, pca, gradient, checkpoints, received 'randm'"),
        ({"normalization": "filters"}, "received 'filters'"),
        ({"n": 1}, "received n=1"),
        ({"span": 0.0}, "received n=21 and span=0.0"),
        ({"bn": "train"}, "eval, recalibrate, received 'train'"),
        ({"dtype": "bf16"}, "received 'bf16'"),
        ({"preset": "paper"}, "official, received 'paper'"),
        (
            {"preset": "official", "normalization": "layer"},
            "neither normalization nor ignore, received 'random', 'layer'",
        ),
        ({"directions": "pca"}, "checkpoints for directions='pca', received none"),
        ({"directions": "eigenvectors"}, "eigenvectors .* received None"),
        ({"directions": [np.ones(24)]}, "at least 2 directions from 'given', received 1"),
        ({"directions": [np.ones(24), -np.ones(24)]}, "span a plane, received a cosine of -1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vs.loss_landscape(bowl(), **options)


def test_a_missing_label_is_named():
    with pytest.raises(ValueError, match="one of the checkpoints a, received 'b'"):
        vs.loss_landscape(bowl(), directions="pca", checkpoints=[("a", {})], labels=["b"])


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (LogNorm(0.62, 744), [1, 10, 100]),
        (LogNorm(0.9, 40), [1, 3, 10, 30]),
        (LogNorm(1.9, 12), [2, 5, 10]),
        (Normalize(19.4, 28), [20, 22, 24, 26, 28]),
        (Normalize(2.26, 2.36), [2.275, 2.3, 2.325, 2.35]),
    ],
)
def test_surface_and_color_bar_have_the_same_round_ticks(scale: Normalize, expected: list[float]) -> None:
    from vitscope.diagnostics.landscape.plot_surface import _loss_ticks

    np.testing.assert_allclose(_loss_ticks(scale), expected)


def test_figures_show_what_is_broken():
    r = overflowing()
    figure = vs.plot({"one": r, "other": r})
    assert "6 of 9 points not finite" in figure.axes[0].get_title()
    figure.draw_without_rendering()
    from vitscope.diagnostics.landscape.plot import plotly_loss_landscape

    interactive = plotly_loss_landscape({"one": r})
    np.testing.assert_array_equal(interactive.data[0].z, np.where(np.isfinite(r.nll), r.nll, np.nan).T)
    crosses = {(x, y) for x, y in zip(interactive.data[1].x, interactive.data[1].y)}
    assert crosses == {(x, y) for x in (-1.0, 1.0) for y in (-1.0, 0.0, 1.0)}
    assert set(interactive.data[1].z) == {r.minimum()[2]}
    assert all(len(button.args[0]["z"]) == 2 for button in interactive.layout.updatemenus[0].buttons)
    assert len(interactive.layout.updatemenus[0].buttons) == 7
    with pytest.raises(ValueError, match="received 'loss'"):
        vs.plot(r, value="loss")
    with pytest.raises(ValueError, match="received 'flat'"):
        vs.plot(r, kind="flat")
