"""A small network, and files of its weights in the forms that training scripts write."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights

State = Mapping[str, Any]


def network(seed: int, classes: int = 5) -> nn.Module:
    """Return a network with normalization, whose running statistics are random, and a classifier."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, classes))
    model[1].running_mean = torch.rand(4)
    model[1].running_var = torch.rand(4) + 0.5
    return model.eval()


#: the weights, and those of an average over training steps
WEIGHTS, AVERAGES = network(1), network(2)
OTHER = network(3)
IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prefixed(prefix: str, state: State) -> OrderedDict[str, Any]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


S = WEIGHTS.state_dict()


def loaded_outputs(path: Path, *, average: bool = False) -> Tensor:
    model = network(7)
    checkpoint_weights.load_weights(model, checkpoint_io.read(path), path, average=average)
    with torch.no_grad():
        return model(IMAGES)
