"""Passes that read a network keep none of its activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.guard import trial_pass

Reference = weakref.ref[torch.UntypedStorage]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.activation = nn.ReLU()  # autograd saves its output

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.activation(self.wide(self.norm(x))))


class Watched(nn.Module):
    """A ResNet that hands weak references to the storages of inner activations on, at the end of each forward pass."""

    def __init__(self, tell: Callable[[list[Reference]], None]) -> None:
        super().__init__()
        self.tell = tell
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        storages = []
        handles = [
            block.activation.register_forward_hook(
                lambda module, args, output: storages.append(weakref.ref(output.untyped_storage()))
            )
            for block in self.blocks
        ]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        for handle in handles:
            handle.remove()
        self.tell(storages)
        return self.head(x.mean((2, 3)))


def n_alive(storages: list[Reference]) -> int:
    return sum(storage() is not None for storage in storages)


def test_a_pass_keeps_no_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_pass, "_SAVED_BYTES", 0)
    counts: list[int] = []
    assert len(vs.structure(Watched(lambda storages: counts.append(n_alive(storages)))).units) == 6
    assert counts
    assert max(counts) <= 1


def test_no_activation_outlives_the_passes() -> None:
    storages: list[Reference] = []
    vs.structure(Watched(storages.extend))
    assert storages
    assert n_alive(storages) == 0


def test_a_network_may_differentiate_in_its_forward_pass() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), Block(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            (slope,) = torch.autograd.grad(self.block.wide(x).square().sum(), x, create_graph=True)
            return self.head(self.block(x - 0.1 * slope).mean((2, 3)))

    assert [unit.kind for unit in vs.structure(Energy()).units] == [
        "conv",
        "conv",
    ]  # the step along the gradient is one
