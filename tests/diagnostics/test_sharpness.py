"""Sharpness of a bowl: half the curvature times the squared radius, and the worst point of the ball."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from tests.fixtures.networks.landscapes import Squared, assert_untouched, batches, bowl, bowl_at, real, snapshot
from vitscope.diagnostics.landscape.sharpness import _saturated
from vitscope.linalg.weights.directions import filter_parameters, normalize, random_direction
from vitscope.linalg.weights.effective_weights import canonical_names


def test_mean_rise_of_a_bowl_is_half_its_curvature():
    probe = bowl()
    parameters, filters = probe.parameters(), filter_parameters(probe.model)
    r = vs.sharpness(probe, radii=(0.1, 0.2), n_pairs=3, n_steps=0, seed=5)
    x = torch.cat([x for x, _ in batches()])
    d = [
        normalize(random_direction(parameters, 5, k, canonical_names(probe.model)), parameters, "filter", filters)[
            "0.weight"
        ]
        for k in range(6)
    ]
    curvatures = np.array([float((x @ one.T).square().sum(dim=1).mean()) for one in d]).reshape(3, 2).mean(axis=1)
    for i, radius in enumerate(r.radii):
        # both signs cancel the slope exactly in a quadratic; differences of nearby losses keep about ten digits
        np.testing.assert_allclose(r.rise_by_pair[i], 0.5 * radius**2 * curvatures, rtol=1e-9)
    low, high = stats.t.interval(0.95, 2, r.rise_by_pair[1].mean(), stats.sem(r.rise_by_pair[1]))
    assert (r.rise_low[1], r.rise_high[1]) == pytest.approx((low, high), rel=1e-10)
    assert np.isnan(r.worst_rise).all()


def test_l2_rises_have_their_closed_forms():
    probe = bowl(weight_decay=0.3)
    r = vs.sharpness(probe, radii=(0.1, 0.2), n_pairs=3, n_steps=0)
    w = probe.model[0].weight.detach()
    square = float(w.square().sum())
    for i, radius in enumerate(r.radii):
        # a filter-normalized direction is as long as the weights, and both signs cancel the product with them
        np.testing.assert_allclose(r.l2_half_sq_rise_by_pair[i], 0.15 * radius**2 * square, rtol=1e-9)
        assert r.scalars()[f"l2_half_sq_rise_r{radius:g}"] == pytest.approx(0.15 * radius**2 * square, rel=1e-9)
    names, own = canonical_names(probe.model), probe.parameters()
    drawn = [random_direction(own, 0, k, names) for k in (0, 1)]
    d = [normalize(one, own, "filter", ["0.weight"])["0.weight"] for one in drawn]
    lengths = [float((w + sign * 0.1 * one).norm()) for one in d for sign in (-1, 1)]
    assert r.l2_sum_norm_rise_by_pair[0, 0] == pytest.approx(0.3 * (np.mean(lengths) - square**0.5), rel=1e-9)


def test_worst_rise_of_a_slope_is_at_the_edge_of_the_ball():
    """One filter that moves, one image: the loss 1/2 (w x - y)^2 is largest where w moves by r |w| along x, away from y."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    probe = vs.Probe(model, [(x, torch.zeros(1, dtype=torch.long))], Squared())
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))  # logit 4, target 1; zeros stay
    before = snapshot(model)
    r = vs.sharpness(probe, radii=(0.1,), n_pairs=1, n_steps=20, n_starts=2)
    reach = 0.1 * 5**0.5 * 6**0.5
    exact = 0.5 * (3 + reach) ** 2 - 0.5 * 9
    np.testing.assert_allclose(r.worst_rise_by_start, exact, rtol=1e-3)  # twenty steps of ascent
    assert (r.worst_rise_by_start <= exact * (1 + 1e-12)).all()
    assert_untouched(model, before)


def test_the_ascent_is_that_of_a_loop_over_its_steps():
    """From r times a normalized direction, steps along the normalized gradient from r to r / n_steps, back into the ball."""
    probe, radius, n_steps = bowl(), 0.3, 4
    w, (x, y) = probe.model[0].weight.detach(), (torch.cat(parts) for parts in zip(*batches()))
    lengths = w.norm(dim=1, keepdim=True)
    drawn = random_direction(probe.parameters(), 7, -1, canonical_names(probe.model))["0.weight"]
    offset = radius * drawn * lengths / drawn.norm(dim=1, keepdim=True)
    met = [bowl_at(w + offset)]
    for step in range(n_steps):
        gradient = ((w + offset) @ x.T - torch.eye(4, dtype=torch.float64)[y].T) @ x
        offset = offset + radius * (1 - step / n_steps) * gradient * lengths / gradient.norm(dim=1, keepdim=True)
        offset = offset * (radius * lengths / offset.norm(dim=1, keepdim=True)).clamp(max=1)
        met.append(bowl_at(w + offset))
    r = vs.sharpness(probe, radii=(radius,), n_pairs=1, n_steps=n_steps, n_starts=1, seed=7)
    assert r.worst_rise[0] == pytest.approx(max(met) - bowl_at(w), rel=1e-9)


def test_worst_is_at_least_every_random_rise_of_its_start():
    r = vs.sharpness(real(), radii=(0.05, 0.2), n_pairs=2, n_steps=5)
    wanted = ~r.saturated
    assert (r.worst_rise[wanted] > r.rise_by_pair[wanted].max(axis=1)).all()


def test_large_radii_and_lost_accuracy_are_saturated():
    torch.manual_seed(0)
    probe = real()
    with torch.no_grad():  # targets that the model meets, so that accuracy can be lost
        probe.model.eval()
        probe.batches = [(x, probe.model(x).argmax(1)) for x, _ in probe.batches]
    r = vs.sharpness(probe, radii=(0.01, 0.5), n_pairs=1, n_steps=0)
    assert r.saturated.tolist() == [False, True]
    assert not any("r0.5" in key for key in r.scalars())
    chance = [(x, torch.full_like(y, 3)) for x, y in probe.batches]
    with torch.no_grad():
        probe.model[-1].bias[3] = -100.0
    assert vs.sharpness(vs.Probe(probe.model, chance), radii=(0.01,), n_pairs=1, n_steps=0).saturated.all()


def test_a_radius_is_saturated_where_a_tenth_of_what_is_above_chance_is_left():
    accuracy = np.array(
        [0.85, 0.4, 0.32, 0.30, 0.25, 0.1]
    )  # of four classes: chance is 0.25, and a tenth of 0.6 is 0.06
    found = _saturated(bowl(), [0.1] * 6, accuracy, 0.85)
    assert found.tolist() == [False, False, False, True, True, True]
    assert _saturated(bowl(), [0.1] * 2, np.array([0.25, 0.3]), 0.2).tolist() == [True, False]  # nothing above chance
    assert _saturated(bowl(), [0.49, 0.5], np.full(2, 0.85), 0.85).tolist() == [False, True]


def test_finished_points_are_not_computed_again():
    probe, partial = real(), {}
    before = snapshot(probe.model)
    options = {"radii": (0.05, 0.1), "n_pairs": 2, "n_steps": 3}
    whole = vs.sharpness(probe, partial=partial, **options)
    assert_untouched(probe.model, before)
    probe.model.register_forward_hook(
        lambda _, args, out: (_ for _ in ()).throw(AssertionError) if len(args[0]) > 1 else None
    )
    again = vs.sharpness(probe, partial=partial, **options)  # one image's pass tells the number of classes
    assert np.array_equal(again.rise_by_pair, whole.rise_by_pair)
    assert np.array_equal(again.worst_rise_by_start, whole.worst_rise_by_start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": ()}, r"radii=\(\)"),
        ({"radii": (0.0,)}, r"radii=\(0.0,\)"),
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"normalization": "none"}, "filter or layer, received 'none'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vs.sharpness(bowl(), **options)


def test_figure_draws_saturated_radii_hollow():
    r = vs.sharpness(real(), radii=(0.1, 0.5), n_pairs=2, n_steps=2)
    figure = vs.plot({"a": r})
    figure.draw_without_rendering()
    assert figure.axes[0].get_legend() is not None
    assert len(figure.axes) == 2  # the worst rises below
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [
        [x for x in r.radii[r.saturated] if r.rise[r.radii == x] > 0]
    ]


def test_figure_marks_rises_that_are_not_finite():
    r = vs.sharpness(real(), radii=(0.05, 0.1), n_pairs=2, n_steps=0)
    broken = dataclasses.replace(r, rise=np.array([np.nan, 0.1]), saturated=np.zeros(2, bool), n_nonfinite=3)
    assert np.isnan(broken.scalars()["rise_r0.05"])  # recorded as null, not left out
    axes = vs.plot({"a": broken}).axes[0]
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [0.05]
    assert "3 points not finite" in axes.get_legend().get_texts()[0].get_text()
