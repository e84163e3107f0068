"""Directions of the landscape: shared with slices, gradients, checkpoints, principal components and eigenvectors of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks.landscapes import batches, bowl, bowl_at, real
from vitscope.linalg.weights.directions import random_direction

NAME = "0.weight"


def test_the_first_direction_is_shared_by_slices_and_landscapes():
    surface = vs.loss_landscape(real(), n=3)
    line = vs.loss_slice(real(), n=3)
    np.testing.assert_allclose(line.nll, surface.nll[:, 1], rtol=1e-12)
    assert not np.array_equal(line.nll, vs.loss_slice(real(), n=3, seed=1).nll)


def test_gradient_is_the_first_axis_and_uphill():
    probe = bowl(weight_decay=0.2)
    r = vs.loss_landscape(probe, directions="gradient", normalization="none", ignore=[], span=1e-4, n=3)
    w = probe.model[0].weight
    loss = sum(probe.objective.data_loss(probe.model(x), y, "sum") for x, y in probe.batches) / 12
    (g,) = torch.autograd.grad(loss + 0.1 * w.square().sum(), w)
    total = r.nll + r.l2_half_sq
    slope = (total[2, 1] - total[0, 1]) / 2e-4  # exact for a quadratic, up to cancellation
    assert slope == pytest.approx(float(g.norm()), rel=1e-8)
    assert abs(total[1, 2] - total[1, 0]) < 1e-10
    assert abs(r.direction_cosine) < 1e-12


def test_two_checkpoints_are_at_one():
    probe = bowl()
    states = [(str(s), {NAME: random_direction({NAME: probe.model[0].weight}, s)[NAME]}) for s in (0, 1)]
    r = vs.loss_landscape(probe, directions="checkpoints", checkpoints=states, n=3)
    assert r.nll[2, 1] == pytest.approx(bowl_at(states[0][1][NAME]), rel=1e-12)
    assert r.nll[1, 2] == pytest.approx(bowl_at(states[1][1][NAME]), rel=1e-12)
    np.testing.assert_allclose(r.path, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(r.projection_error, 0, atol=1e-7)  # a root of rounding
    assert r.labels == ("0", "1")


def test_pca_reaches_the_farthest_checkpoint():
    probe = bowl()
    w = probe.model[0].weight.detach()
    states = [(str(s), {NAME: w + (s + 1) * random_direction({NAME: w}, s)[NAME]}) for s in range(3)]
    r = vs.loss_landscape(probe, directions="pca", checkpoints=states, n=3)
    np.testing.assert_allclose(np.abs(r.path).max(axis=0), 1, rtol=1e-12)
    assert abs(r.direction_cosine) < 1e-12
    assert ((r.projection_error > 0) & (r.projection_error < 1)).all()
    few = vs.loss_landscape(probe, directions="pca", checkpoints=states, labels=["2", "0"], n=3)
    assert few.labels == ("2", "0")


def test_eigenvectors_from_a_saved_file(tmp_path: Path):
    probe = bowl()
    x = torch.cat([x for x, _ in batches()])
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # the Hessian is this matrix once for each logit
    top = torch.zeros(2, 4, 6, dtype=torch.float64)
    top[0, 0], top[1, 1] = vectors[:, -1], vectors[:, 0]
    np.savez(tmp_path / "end.npz", eigenvectors=top.flatten(1).numpy())
    r = vs.loss_landscape(probe, directions="eigenvectors", eigenvectors=tmp_path / "end.npz", n=3)
    assert np.diff(r.nll[:, 1], 2)[0] == pytest.approx(float(values[-1]), rel=1e-10)
    assert np.diff(r.nll[1], 2)[0] == pytest.approx(float(values[0]), rel=1e-10)


def test_files_without_eigenvectors_are_refused(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "empty.npz", eigenvectors=np.zeros((0, 0)))
    for name, why in (("text.npz", "a saved result"), ("array.npy", "a saved result"), ("empty.npz", "holds none")):
        with pytest.raises(ValueError, match=why):
            vs.loss_landscape(bowl(), directions="eigenvectors", eigenvectors=tmp_path / name)
