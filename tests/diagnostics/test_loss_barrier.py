"""The barrier against a hill of known height."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, bowl, bowl_at, snapshot


class Hill(nn.Module):
    """Two-class logits (s, 0) with s = w^2 - 1: for class 0 the nll is log(1 + exp(1 - w^2)), highest at w = 0."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        s = (self.w.square() - 1).expand(len(x))
        return torch.stack([s, torch.zeros_like(s)], dim=1)


def test_a_hill_has_its_known_height():
    probe = vs.Probe(Hill(2.0), [(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.long))])
    before = snapshot(probe.model)
    r = vs.loss_barrier(probe, checkpoints=[("left", {"w": torch.tensor([-2.0], dtype=torch.float64)})], n=5)
    top, foot = np.log1p(np.exp(1.0)), np.log1p(np.exp(-3.0))
    assert r.barrier == pytest.approx(top - foot, rel=1e-13)
    assert r.t_barrier == 0.5
    assert r.accuracy_barrier == 1.0
    assert (r.start, r.end, r.distance) == ("left", "model", 4.0)
    assert_untouched(probe.model, before)


def test_a_bowl_has_none():
    probe = bowl()
    w = probe.model[0].weight.detach()
    r = vs.loss_barrier(probe, checkpoints=[("a", {"0.weight": w + 1.0})], n=5)
    assert r.barrier == 0.0
    assert r.nll[0] == pytest.approx(bowl_at(w + 1.0), rel=1e-13)


def test_a_broken_way_is_an_infinite_barrier():
    probe = bowl()
    w = probe.model[0].weight.detach()
    r = vs.loss_barrier(probe, checkpoints=[("nan", {"0.weight": w * float("nan")}), ("same", {"0.weight": w})], n=3)
    assert r.barrier == float("inf")
    assert r.n_nonfinite == 2
    figure = vs.plot(r)
    figure.draw_without_rendering()


def test_figure_names_the_barrier():
    probe = bowl()
    r = vs.loss_barrier(probe, checkpoints=[("a", {"0.weight": torch.zeros(4, 6, dtype=torch.float64)})], n=3)
    axes = vs.plot({"net": r}).axes[0]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), r.chord)
    assert axes.lines[0].get_label() == f"net: a to this model: {r.barrier:.3g}"
