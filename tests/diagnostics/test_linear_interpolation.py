"""The straight way: exact at both ends, a parabola in a bowl."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, bowl, bowl_at, real, snapshot
from vitscope.core.evaluation import evaluate
from vitscope.linalg.weights.directions import random_direction

NAME = "0.weight"


def states(probe: vs.Probe) -> list[tuple[str, dict[str, torch.Tensor]]]:
    return [(str(seed), random_direction(probe.model.state_dict(), seed)) for seed in range(3)]


def test_a_bowl_gives_its_parabola():
    probe = bowl()
    (_, a), *_, (_, b) = points = states(probe)
    r = vs.linear_interpolation(probe, checkpoints=points, n=5, t_min=-0.5, t_max=1.5)
    assert (r.start, r.end) == ("0", "2")
    np.testing.assert_allclose(r.nll, [bowl_at((1 - t) * a[NAME] + t * b[NAME]) for t in r.t], rtol=1e-12)
    assert r.distance == pytest.approx(float((a[NAME] - b[NAME]).norm()), rel=1e-12)


def test_both_ends_are_the_saved_networks_buffers_included():
    probe = real()
    other = real()
    with torch.no_grad():
        for value in other.model.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.5).add_(0.1)
    before = snapshot(probe.model)
    r = vs.linear_interpolation(probe, checkpoints=[("other", snapshot(other.model))], n=3)
    assert (r.start, r.end) == ("other", "model")
    for index, network in ((0, other.model), (2, probe.model)):
        network.eval()
        assert r.nll[index] == evaluate(network, probe.batches).nll
    assert_untouched(probe.model, before)


def test_l2_follows_the_way():
    probe = real(weight_decay=0.2)
    points = [("a", {n: v + 1.0 for n, v in snapshot(probe.model).items()})]
    r = vs.linear_interpolation(probe, checkpoints=points, n=3)
    ends = [{n: p.detach() + 1.0 for n, p in probe.parameters().items()}, probe.parameters()]
    for index, weights in ((0, ends[0]), (2, ends[1])):
        weights = {n: w.detach() for n, w in weights.items()}
        assert r.l2_half_sq[index] == pytest.approx(float(probe.objective.l2_half_sq(weights)), rel=1e-12)
        assert r.l2_sum_norm[index] == pytest.approx(float(probe.objective.l2_sum_norm(weights)), rel=1e-12)


def test_finished_points_are_not_computed_again():
    probe, partial = bowl(), {}
    whole = vs.linear_interpolation(probe, checkpoints=states(probe), n=3, partial=partial)
    del partial[list(partial)[1]]
    passes = []
    probe.model.register_forward_hook(lambda *_: passes.append(1))
    again = vs.linear_interpolation(probe, checkpoints=states(probe), n=3, partial=partial)
    assert len(passes) == len(probe.batches)
    assert np.array_equal(whole.nll, again.nll)


def test_largest_rise_is_zero_for_a_descent():
    probe = bowl()
    r = vs.linear_interpolation(probe, checkpoints=states(probe), n=9)
    rises = [r.nll[j] - r.nll[i] for i in range(9) for j in range(i, 9)]
    assert r.scalars()["largest_rise"] == pytest.approx(max(rises), rel=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": []}, "received none"),
        ({"checkpoints": [("a", {})]}, "'0.weight' in checkpoint 'a', received none"),
        ({"checkpoints": [("a", {NAME: torch.zeros(2)})]}, r"shape \(4, 6\) in checkpoint 'a', received \(2,\)"),
        ({"checkpoints": [("a", {})], "start": "b"}, "one of the checkpoints a, received 'b'"),
        ({"checkpoints": [("a", {})], "n": 1}, "t_max=1, n=1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vs.linear_interpolation(bowl(), **options)


def test_figure_shows_both_curves():
    probe = bowl()
    r = vs.linear_interpolation(probe, checkpoints=states(probe), n=3)
    figure = vs.plot({"a": r})
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), r.nll)
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), r.accuracy)
