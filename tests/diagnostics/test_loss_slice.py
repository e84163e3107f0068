"""Slices: the mean over directions and its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, bowl, bowl_at, real, snapshot
from vitscope.linalg.weights.directions import filter_parameters, normalize, random_direction
from vitscope.linalg.weights.effective_weights import canonical_names


def test_each_line_has_its_known_values():
    probe = bowl()
    parameters, filters = probe.parameters(), filter_parameters(probe.model)
    w = parameters["0.weight"].detach().clone()
    r = vs.loss_slice(probe, span=0.5, n=5, n_directions=3, seed=7)
    for k in range(3):
        d = normalize(random_direction(parameters, 7, k, canonical_names(probe.model)), parameters, "filter", filters)[
            "0.weight"
        ]
        np.testing.assert_allclose(r.nll_by_direction[k], [bowl_at(w + a * d) for a in r.x], rtol=1e-13)
        assert r.direction_norms[k] == pytest.approx(float(w.norm()), rel=1e-13)  # every filter's norm is the weights'


def test_the_band_is_the_t_interval_over_directions():
    r = vs.loss_slice(real(), n=3, n_directions=4)
    for i in (0, 2):
        low, high = stats.t.interval(0.95, 3, r.nll_by_direction[:, i].mean(), stats.sem(r.nll_by_direction[:, i]))
        assert (r.nll_low[i], r.nll_high[i]) == pytest.approx((low, high), rel=1e-10)
    assert np.isnan(vs.loss_slice(real(), n=3).nll_low).all()


def test_l2_curves_average_over_directions():
    probe = real(weight_decay=0.3)
    d = [random_direction(probe.parameters(), seed) for seed in (0, 1)]
    r = vs.loss_slice(probe, directions=d, n=3, n_directions=2)
    for i, a in enumerate(r.x):
        moved = [{n: p.detach() + a * one[n] for n, p in probe.parameters().items()} for one in d]
        assert r.l2_half_sq[i] == pytest.approx(
            np.mean([float(probe.objective.l2_half_sq(m)) for m in moved]), rel=1e-12
        )
        assert r.l2_sum_norm[i] == pytest.approx(
            np.mean([float(probe.objective.l2_sum_norm(m)) for m in moved]), rel=1e-12
        )


def test_resumed_lines_equal_fresh_ones_and_the_model_is_untouched():
    probe, partial = real(), {}
    before = snapshot(probe.model)
    whole = vs.loss_slice(probe, n=3, n_directions=2, partial=partial)
    assert len(partial) == 6
    for key in list(partial)[1:5]:
        del partial[key]
    passes = []
    handle = probe.model.register_forward_hook(lambda *_: passes.append(1))
    again = vs.loss_slice(probe, n=3, n_directions=2, partial=partial)
    handle.remove()
    assert len(passes) == 4 * len(probe.batches)
    assert np.array_equal(again.nll_by_direction, whole.nll_by_direction)
    assert_untouched(probe.model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_directions": 0}, "n_directions=0"),
        ({"preset": "paper"}, "received 'paper'"),
        ({"directions": [np.ones(24)], "n_directions": 2}, "at least 2 directions from 'given', received 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vs.loss_slice(bowl(), **options)


def test_figure_has_a_line_for_every_direction():
    r = vs.loss_slice(real(), n=3, n_directions=3)
    axes = vs.plot({"a": r, "b": r}).axes[0]
    assert len(axes.lines) == 2 * (1 + 3)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), r.nll)
    with pytest.raises(ValueError, match="received 'loss'"):
        vs.plot(r, value="loss")
