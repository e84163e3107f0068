"""Networks that keep a table made from a weight in different places, and reference values of their derivatives."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.directions import random_direction
from vitscope.linalg.weights.weight_space_walk import points_in_plane


class Net(nn.Module):
    """Multiplies by a table that is made from a weight; the ways to keep the table are the subclasses'."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64))
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def make(self) -> Tensor:
        return self.scale.exp()

    def table(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.table()


class InDictionary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def table(self) -> Tensor:
        if "x" not in self.cache:
            self.cache["x"] = self.make()
        return self.cache["x"]


class InList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def table(self) -> Tensor:
        if not self.cache:
            self.cache.append(self.make())
        return self.cache[0]


class InAttribute(Net):
    kept: Tensor | None = None

    def table(self) -> Tensor:
        if self.kept is None:
            self.kept = self.make()
        return self.kept


class InNewAttribute(Net):
    def table(self) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = (self.make().detach(), 3)
        return self.kept[0]


class InCachedProperty(Net):
    @functools.cached_property
    def kept(self) -> Tensor:
        return self.make()

    def table(self) -> Tensor:
        return self.kept


class InMethodCache(Net):
    @functools.cache  # noqa: B019  a network as users write them
    def kept(self) -> Tensor:
        return self.make()

    def table(self) -> Tensor:
        return self.kept()


class InBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)

    def table(self) -> Tensor:
        if self.kept is None:
            self.kept = self.make().detach()
        return self.kept


class InRegisteredBuffer(Net):
    def table(self) -> Tensor:
        if "kept" not in self._buffers:
            self.register_buffer("kept", self.make().detach())
        return self.kept


class Holder:
    table: Tensor | None = None


class InObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def table(self) -> Tensor:
        if self.holder.table is None:
            self.holder.table = self.make()
        return self.holder.table


KINDS = [
    InDictionary, InList, InAttribute, InNewAttribute, InCachedProperty, InMethodCache, InBuffer, InRegisteredBuffer, InObject,
]  # fmt: skip


def answers(model: nn.Module, batches: list, factor: float) -> tuple[float, float, float]:
    """Return the nll at the weights, after a step along a direction, and at the weights again."""
    probe = vs.Probe(model, batches)
    direction = random_direction(probe.parameters(), 0)
    with guarded_evaluation(probe) as (_, here), points_in_plane(probe.parameters(), None, direction) as move:
        found = []
        for at in (0.0, factor, 0.0):
            move(0.0, at)
            found.append(here()["nll"])
    return found[0], found[1], found[2]


def moved_copy(fresh: nn.Module, model: nn.Module, factor: float) -> nn.Module:
    direction = random_direction(dict(model.named_parameters()), 0)
    state = {name: value.clone() for name, value in model.state_dict().items() if name in dict(fresh.state_dict())}
    for name, d in direction.items():
        state[name].add_(d, alpha=factor)
    fresh.load_state_dict(state)
    return fresh.eval()


def attributes(model: nn.Module) -> list:
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return id(value), [(k, id(v)) for k, v in value.items()]
        return (id(value), [id(v) for v in value]) if isinstance(value, list) else id(value)

    return [{key: plain(value) for key, value in vars(m).items()} for m in model.modules()]
