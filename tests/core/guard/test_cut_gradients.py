"""Values that depend on the weights and are taken for constants by autograd are told where the loss's slope shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.guard.repeatability import CutGradientsWarning


class Binary(nn.Linear):
    """A layer of signs with a straight-through estimator."""

    def forward(self, x: Tensor) -> Tensor:
        signs = self.weight.sign() * self.weight.abs().mean()
        return x @ (self.weight + (signs - self.weight).detach()).T + self.bias


class FixedPoint(nn.Linear):
    """The last step of an iteration, whose earlier steps have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(20):
                z = x + 0.5 * torch.tanh(super().forward(z))
        return x + 0.5 * torch.tanh(super().forward(z))


class Centered(nn.Linear):
    """A softmax that takes its largest score, and the sum of its scores, for constants without an effect."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        with torch.no_grad():
            total = scores.sum(1, keepdim=True)
        weights = (scores - scores.amax(1, keepdim=True).detach()).exp()
        return x * weights / weights.sum(1, keepdim=True) + 0 * total


def probe(layer: type[nn.Linear], dtype: torch.dtype = torch.float64) -> vs.Probe:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), layer(6, 6), nn.Linear(6, 3)).to(dtype)
    return vs.Probe(model, [(torch.randn(8, 6, dtype=dtype), torch.arange(8) % 3)])


@pytest.mark.parametrize("layer", [Binary, FixedPoint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_module_that_cuts_a_value_off_is_named(layer: type[nn.Linear], dtype: torch.dtype) -> None:
    measured = probe(layer, dtype)
    before = {name: t.clone() for name, t in measured.model.state_dict().items()}
    with pytest.warns(CutGradientsWarning, match=r"\(detach\(\), no_grad\) in 1: its slope .* differs by [\d.]+%"):
        vs.hessian_trace(measured, n_vectors=1)
    assert all(torch.equal(t, before[name]) for name, t in measured.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constants_without_an_effect_are_not_told(dtype: torch.dtype) -> None:
    vs.hessian_trace(probe(Centered, dtype), n_vectors=1)
