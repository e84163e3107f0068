"""Trajectories of known shape: a right angle, a straight way, a way that leaves its plane."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, bowl, bowl_at, real, snapshot
from vitscope.core.evaluation import evaluate
from vitscope.runtime.errors import NumericalError

NAME = "0.weight"


def way(*offsets: tuple[float, float, float]) -> tuple[vs.Probe, list[tuple[str, dict[str, torch.Tensor]]]]:
    """Return a bowl and checkpoints at the model's weights plus offsets along three coordinate axes."""
    probe = bowl()
    w = probe.model[0].weight.detach()
    points = []
    for index, offset in enumerate(offsets):
        moved = w.clone()
        moved.view(-1)[:3] += torch.tensor(offset, dtype=torch.float64)
        points.append((f"epoch {index}", {NAME: moved}))
    return probe, points


def test_polar_form_of_a_right_angle():
    probe, points = way((2, 0, 0), (0, 1, 0), (0, 0, 0))
    r = vs.trajectory(probe, checkpoints=points)
    np.testing.assert_allclose(r.radius, [1, 0.5, 0], atol=1e-14)
    np.testing.assert_allclose(r.angle, [0, np.pi / 2, np.nan], atol=1e-12)
    assert r.straightness == pytest.approx(2 / (5**0.5 + 1), rel=1e-12)


def test_a_plane_way_lies_in_its_plane():
    probe, points = way((3, 1, 0), (2, 2, 0), (1, 0, 0))
    r = vs.trajectory(probe, checkpoints=points, n=3)
    assert r.explained_variance.sum() == pytest.approx(1, abs=1e-12)
    assert r.projection_error.max() == 0
    np.testing.assert_allclose(r.in_plane_nll, r.nll, rtol=1e-10)
    np.testing.assert_allclose((r.coordinates**2).sum(axis=1), [10, 8, 1], rtol=1e-12)
    assert r.plane_nll.shape == (3, 3)
    assert r.x[0] < r.coordinates[:, 0].min()
    assert r.x[-1] > r.coordinates[:, 0].max()


def test_what_leaves_the_plane_is_stated():
    # orthogonal differences of lengths 3, 2, 1: the plane holds the first two, and nothing of the third
    probe, points = way((3, 0, 0), (0, 2, 0), (0, 0, 1))
    r = vs.trajectory(probe, checkpoints=points)
    np.testing.assert_allclose(r.explained_variance, [9 / 14, 4 / 14], rtol=1e-12)
    np.testing.assert_allclose(r.projection_error, [0, 0, 1], atol=1e-7)
    assert r.nll[2] == pytest.approx(bowl_at(points[2][1][NAME]), rel=1e-13)
    assert r.in_plane_nll[2] == pytest.approx(bowl_at(probe.model[0].weight.detach()), rel=1e-12)
    assert r.scalars()["largest_nll_gap"] == pytest.approx(np.abs(r.nll - r.in_plane_nll).max(), rel=1e-14)


def test_one_independent_difference_is_enough():
    probe, points = way((2, 0, 0), (1, 0, 0))
    r = vs.trajectory(probe, checkpoints=points)
    np.testing.assert_allclose(r.explained_variance, [1, 0], atol=1e-12)
    np.testing.assert_allclose(np.abs(r.coordinates), [[2, 0], [1, 0]], atol=1e-12)
    assert r.straightness == pytest.approx(1, rel=1e-12)


def test_checkpoints_are_measured_with_their_own_buffers():
    probe, other = real(), real()
    with torch.no_grad():
        for value in other.model.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.2).add_(0.05)
    before = snapshot(probe.model)
    r = vs.trajectory(probe, checkpoints=[("other", snapshot(other.model)), ("last", before)])
    other.model.eval()
    assert r.nll[0] == evaluate(other.model, probe.batches).nll
    probe.model.eval()
    assert r.nll[1] == r.in_plane_nll[1] == evaluate(probe.model, probe.batches).nll
    assert_untouched(probe.model, before)


def test_labels_choose_and_order():
    probe, points = way((3, 0, 0), (0, 2, 0), (0, 0, 1))
    assert vs.trajectory(probe, checkpoints=points, labels=["epoch 2", "epoch 0"]).labels == ("epoch 2", "epoch 0")


def test_finished_points_are_not_computed_again():
    (probe, points), partial = way((3, 0, 0), (0, 2, 0)), {}
    whole = vs.trajectory(probe, checkpoints=points, n=2, partial=partial)
    assert len(partial) == 2 + 2 + 4
    passes = []
    probe.model.register_forward_hook(lambda *_: passes.append(1))
    again = vs.trajectory(probe, checkpoints=points, n=2, partial=partial)
    assert not passes
    assert np.array_equal(again.plane_nll, whole.plane_nll)


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        ([], {}, "received none"),
        ([(0, 0, 0)], {}, "differs from the model, received 'epoch 0'"),
        ([(1, 0, 0)], {"n": 1}, "received n=1"),
        ([(1, 0, 0)], {"labels": ["epoch 9"]}, "one of the checkpoints epoch 0, received 'epoch 9'"),
    ],
)
def test_bad_options_are_refused(offsets: list, options: dict, message: str):
    probe, points = way(*offsets)
    with pytest.raises(ValueError, match=message):
        vs.trajectory(probe, checkpoints=points, **options)


def test_figures_print_the_errors_of_the_plane():
    probe, points = way((3, 0, 0), (0, 2, 0), (0, 0, 1))
    r = vs.trajectory(probe, checkpoints=points, n=3)
    figure = vs.plot({"a": r, "b": r})
    figure.draw_without_rendering()
    title = figure.axes[0].get_title()
    assert "92.9% of the variance" in title
    assert "100% of their distance" in title
    vs.plot(r, kind="polar").draw_without_rendering()
    with pytest.raises(ValueError, match="received 'flat'"):
        vs.plot(r, kind="flat")


def test_a_checkpoint_that_is_not_finite_is_named():
    """A training that diverged: its checkpoints span no plane (the solver of the plane did not converge, without a name)."""
    probe, points = way((3, 1, 0), (2, 2, 0), (1, 0, 0))
    points[1][1][NAME].view(-1)[0] = float("nan")
    for measure, options in ((vs.trajectory, {}), (vs.loss_landscape, {"n": 3, "directions": "pca"})):
        with pytest.raises(
            NumericalError, match=f"checkpoint=epoch 1: weights of '{NAME}' are not finite; leave it out"
        ):
            measure(probe, checkpoints=points, **options)
        assert np.isfinite(
            measure(probe, checkpoints=points, labels=["epoch 0", "epoch 2"], **options).projection_error
        ).all()
