"""Branches that end with a module that writes over its input and whose result the network does not use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.networks.own_networks import B, C, check


class InPlace(nn.Module):
    """Residual convolutions, each with an activation in place that is called as a statement."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, C, 2, 2), nn.Linear(C, 4)
        self.layers, self.activation = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(2)), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            branch = layer(x)
            self.activation(branch)
            x = x + B(branch)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("activation", [nn.SiLU(inplace=True), nn.ReLU(inplace=True)])
def test_a_lesion_reaches_the_tensor_that_an_activation_wrote_to(activation: nn.Module) -> None:
    torch.manual_seed(0)
    check(InPlace(activation), ["conv", "conv"], {"stem.*": "stem", "layers.*": "conv", "head.*": "head"})
