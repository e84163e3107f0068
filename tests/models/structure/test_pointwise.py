"""MLPs made of 1x1 convolutions are told by what runs, not by names; parallel branches of maps have a kind."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import units

C = 8


class Mixing(nn.Module):
    """A residual branch of two 1x1 convolutions; ``way`` says how it is written."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        groups = 2 if way == "groups" else 1
        self.a = nn.Conv2d(C, 4 * C, 1, groups=groups)
        self.b = nn.Conv2d(2 * C if "gated" in way else 4 * C, C, 1, groups=groups)
        self.norm = nn.BatchNorm2d(C)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.scale = nn.Parameter(torch.full((C, 1, 1), 0.1))

    def inner(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.way == "gated":
            first, second = hidden.chunk(2, 1)
            return F.silu(first) * second
        if self.way == "gated linear unit":
            return F.glu(hidden, 1)
        if self.way == "square":
            return F.relu(hidden) ** 2
        return hidden if self.way == "linear" else F.gelu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "two branches":
            x = x + self.scale * self.depthwise(self.norm(x))
            return x + self.b(self.inner(x))
        if self.way == "depthwise first":
            return x + self.scale * self.b(self.inner(self.norm(self.depthwise(x))))
        x = x + 0 * self.depthwise(x)
        branch = self.scale * F.dropout(self.b(self.inner(self.norm(x))), 0.1, self.training)
        if self.way == "in place":
            x += branch
            return x
        return self.norm(torch.add(x, branch))


def network(way: str, known: bool) -> nn.Module:
    body = [BasicBlock(C, C), Mixing(way), BasicBlock(C, C)] if known else [Mixing(way), nn.Conv2d(C, C, 3, padding=1)]
    stem, head = nn.Conv2d(3, C, 3, 2, 1), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)]
    return nn.Sequential(stem, *body, *head).eval()


@pytest.mark.parametrize("known", [False, True], ids=["plain", "residual blocks"])
@pytest.mark.parametrize("way", ["added", "in place", "gated", "gated linear unit", "square", "groups", "two branches"])
def test_mlps_of_1x1_convolutions_are_no_convolutions(way: str, known: bool) -> None:
    model = network(way, known)
    kinds = parameter_kinds(model, torch.rand(1, 3, 16, 16))
    place = 2 if known else 1
    assert kinds[f"{place}.a.weight"] == kinds[f"{place}.b.weight"] == "mlp"
    assert kinds[f"{place}.depthwise.weight"] == "conv"
    assert ("mlp", f"{place}") in {
        (tap.kind, tap.name.split(".")[0]) for tap in vs.taps(model, torch.rand(1, 3, 16, 16))
    }


@pytest.mark.parametrize("way", ["linear", "depthwise first"])
def test_branches_with_a_spatial_kernel_or_without_a_nonlinearity_are_convolutions(way: str) -> None:
    kinds = parameter_kinds(network(way, known=True), torch.rand(1, 3, 16, 16))
    assert kinds["2.a.weight"] == kinds["2.b.weight"] == "conv"


@pytest.mark.parametrize(
    "name", ["starnet_s1", "mobilenetv4_conv_small", "ecaresnet26t", "gcresnet33ts", "ghostnet_050"]
)
def test_convolutional_networks_of_timm_have_no_such_mlp(name: str) -> None:
    kinds = parameter_kinds(timm.create_model(name, num_classes=4).eval(), torch.rand(1, 3, 64, 64))
    assert set(kinds.values()) <= {"stem", "conv", "pool", "head"}


def test_parallel_branches_belong_to_the_body() -> None:
    model = timm.create_model("hrnet_w18_small", num_classes=4).eval()
    kinds = parameter_kinds(model, torch.rand(1, 3, 64, 64))
    assert kinds["stage4.0.fuse_layers.0.1.0.weight"] == "conv"  # reaches the units that follow
    assert kinds["downsamp_modules.0.0.weight"] == "conv"  # is added to what the last unit makes
    assert kinds["conv1.weight"] == "stem"
    assert kinds["final_layer.0.weight"] == kinds["classifier.weight"] == "head"
    assert {unit.kind for unit in units(model, torch.rand(1, 3, 64, 64))} == {"conv"}


def test_registration_takes_the_place_of_execution_with_a_notice() -> None:
    class Refuses(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    with pytest.warns(UserWarning, match="does not run on images"):
        assert parameter_kinds(Refuses(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))["1.weight"] == "conv"
