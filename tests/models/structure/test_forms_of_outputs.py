"""Networks and branches that return dataclasses and named tuples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.linalg.per_example_gradients import PerExampleGradients
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import units, zeroed


class Pair(NamedTuple):
    """A result and what belongs to it."""

    values: Tensor
    weights: Tensor | None = None


@dataclass
class Output:
    """An output with logits ``(B, 3)``."""

    logits: Tensor


class Plain(nn.Module):
    """A network without residual units that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        """Return the output of images ``(B, 3, H, W)``."""
        return Output(self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3))))


class Branch(nn.Module):
    """A layer that returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Pair:
        """Return a pair for tokens ``(B, N, 8)``."""
        return Pair(self.layer(x).tanh())


class Residual(nn.Module):
    """A network of two branches that return named tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.branches = nn.ModuleList([Branch(), Branch()])

    def forward(self, x: Tensor) -> Pair:
        """Return a pair with logits ``(B, 3)``."""
        tokens = self.patches(x).flatten(2).mT
        for branch in self.branches:
            tokens = tokens + branch(tokens).values
        return Pair(self.head(tokens.mean(1)))


def image() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_parameters_of_a_network_that_returns_a_dataclass_have_kinds() -> None:
    kinds = parameter_kinds(Plain().double(), image())
    assert {name: kinds[f"{name}.weight"] for name in ("first", "norm", "second", "head")} == {
        "first": "conv", "norm": "conv", "second": "conv", "head": "head",
    }  # fmt: skip


@torch.no_grad()
def test_a_branch_that_returns_a_named_tuple_is_removed() -> None:
    model, x = Residual().double().eval(), image()
    with zeroed(*units(model, x)):
        assert torch.equal(model(x).values, model.head(model.patches(x).flatten(2).mT.mean(1)))


def test_gradients_of_images_of_a_network_that_returns_a_named_tuple() -> None:
    torch.manual_seed(0)
    model, x, y = Residual().double().eval(), image(), torch.tensor([0, 2])
    parameters = dict(model.named_parameters())
    gradients = PerExampleGradients(model, lambda pair, y: F.cross_entropy(pair.values, y), parameters)
    (rows,) = gradients(x, y)
    for i, row in enumerate(rows):
        expected = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]).values, y[i : i + 1]), [*parameters.values()]
        )
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]), rtol=0, atol=1e-14)
