"""Functions with a kink: named where the analyzed weights reach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.linalg.differences.kinks import kinked_functions


class OwnFunction(nn.Module):
    """A function of a layer's outputs, times a parameter with a bound that it does not reach."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.layer, self.temperature = function, nn.Linear(4, 4), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x)) * self.temperature.clamp(max=100.0)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (F.relu, ("relu",)),
        (lambda x: x.relu_(), ("relu",)),
        (lambda x: x.clamp(min=0), ("clamp",)),
        (lambda x: x.clamp_(-1, 1), ("clamp",)),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), ("maximum",)),
        (lambda x: x.abs(), ("abs",)),
        (abs, ("abs",)),
        (lambda x: x.max(dim=1, keepdim=True).values, ("max",)),
        (lambda x: x.sort(dim=1).values, ("sort",)),
        (F.selu, ("selu",)),
        (lambda x: torch.where(x > 0, x, 0.1 * x), ("gt",)),
        (lambda x: x * (x >= 0), ("ge",)),
        (lambda x: x.masked_fill(torch.lt(x, 0), 0), ("lt",)),
        (lambda x: x * x.sign(), ("sign",)),
        (lambda x: x.gather(1, x.argmax(dim=1, keepdim=True)), ("argmax",)),
        (lambda x: F.elu(x, alpha=0.5), ("elu",)),
        (nn.ELU(0.5), ("elu",)),
        (F.gelu, ()),
        (F.elu, ()),
        (lambda x: F.normalize(x, dim=1), ()),
        (lambda x: x.softmax(dim=1), ()),
    ],
)
def test_functions_with_kinks_are_named(function: Any, names: tuple[str, ...]) -> None:
    assert kinked_functions(OwnFunction(function), torch.randn(2, 4)) == names


def test_functions_that_the_analyzed_weights_do_not_reach_are_left_out() -> None:
    body, head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)
    assert kinked_functions(nn.Sequential(body, nn.ReLU(), head), torch.randn(2, 4)) == ()
    body.requires_grad_(True)
    assert kinked_functions(nn.Sequential(nn.ReLU(), body, nn.ReLU(), head), torch.randn(2, 4)) == ("relu",)
