"""Blocks whose children have the names of a ResNet's: they are read so only where a forward pass runs them so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.residual_units import Unit, reading_branches, units, zeroed


class Block(nn.Module):
    """Layers that are registered as those of a ResNet's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()


class PreActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``; the branch ends with the second convolution."""
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + self.shortcut(x)


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``; a tenth of the branch is added."""
        return self.shortcut(x) + 0.1 * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Halved(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H / 2, W / 2)``; the branch is pooled before it is added, and zeros widen nothing."""
        pooled = F.avg_pool2d(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), 2)
        return pooled + F.avg_pool2d(self.shortcut(x), 2)


class Concatenated(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``: nothing is added."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return torch.cat((F.relu(branch), self.shortcut(x)), 1)[:, : x.shape[1]]


class Plain(nn.Module):
    """A level of a U-Net's encoder, whose ``downsample`` pools."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.downsample = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H / 2, W / 2)``."""
        return self.downsample(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


class Widened(Block):
    """A strided block whose shortcut fills new channels with zeros, as in ResNets for CIFAR."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.shortcut = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, 2 C, H / 2, W / 2)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.shortcut(x)
        out += torch.cat((half, half.mul(0)), 1)
        return F.relu(out)


def network(block: Callable[[int], nn.Module], width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model


def image() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", [PreActivation, Scaled, Halved])
@torch.no_grad()
def test_the_branch_is_what_is_added(block: Callable[[int], nn.Module]) -> None:
    model, x = network(block), image()
    (unit,) = units(model, x)
    read: dict[str, Tensor] = {}

    def keep(_: int, __: Unit, side: str, value: Tensor) -> None:
        read[side] = value.clone()

    with reading_branches(model, [unit], keep):
        model(x)
    stream = model[0](x)
    with zeroed(unit):
        shortcut = model[1](stream)
    expected = F.avg_pool2d(stream, 2) if block is Halved else stream
    assert torch.equal(shortcut, expected)
    # a sum of two numbers of order 1 and back, float64
    torch.testing.assert_close(read["output"], model[1](stream) - expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block", [Concatenated, Plain])
def test_a_block_that_adds_nothing_is_no_residual_unit(block: Callable[[int], nn.Module]) -> None:
    structure = vs.structure(network(block), image())
    assert not structure.is_residual
    assert [unit.name for unit in structure.units if unit.kind == "conv"] == ["0", "1.conv1", "1.conv2"]


@torch.no_grad()
def test_a_shortcut_that_fills_channels_with_zeros_is_one() -> None:
    model, x = network(Widened), image()
    (unit,) = units(model, x)
    assert unit.branch_out is not None
    assert unit.branch_out.module is model[1].bn2
    half = F.avg_pool2d(model[0](x), 2)
    with zeroed(unit):
        assert torch.equal(model[1](model[0](x)), F.relu(torch.cat((half, 0 * half), 1)))


class Strided(Block):
    """A block whose shortcut is a 3x3 convolution too."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(width, width, 3, 2, padding=1)
        self.shortcut = nn.Conv2d(width, width, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H / 2, W / 2)``."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def test_the_convolution_that_an_identity_replaces_is_of_the_branch() -> None:
    model = network(Strided)
    (unit,) = units(model, image())
    assert unit.conv3x3 is model[1].conv2
