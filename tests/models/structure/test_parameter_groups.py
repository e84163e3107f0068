"""Kinds and stages of parameters: by the order of execution, whatever the order of registration."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.fixtures.networks import timm_versions
from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages


class Ordered(nn.Module):
    """A small vision transformer whose modules are registered in an order of choice."""

    def __init__(self, order: str, side_head: bool = False) -> None:
        super().__init__()
        for key in order.split():
            if key == "head":
                self.head = nn.Linear(8, 4)
            elif key == "stem":
                self.stem = nn.Conv2d(3, 8, 4, 4)
            else:
                self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.side = nn.Linear(8, 4) if side_head else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.blocks[0](x)
        side = self.side(x[:, 0]) if self.side is not None else 0
        return self.head(self.blocks[1](x)[:, 0]) + side


@pytest.mark.parametrize("order", ["head stem blocks", "blocks head stem", "stem blocks head", "blocks stem head"])
def test_kinds_follow_the_order_of_execution(order: str) -> None:
    model = Ordered(order)
    kinds, stages = parameter_kinds(model), parameter_stages(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert {name for name, kind in kinds.items() if kind == "stem"} == {"stem.weight", "stem.bias", "token"}
    assert {name for name, kind in kinds.items() if kind == "head"} == {"head.weight", "head.bias"}
    assert stages["head.weight"] == 2
    assert stages["token"] == stages["stem.weight"] == 0
    assert kinds["blocks.1.attn.qkv.weight"] == "msa"


def test_a_head_in_the_middle_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"received 'side.weight' used before the end of the last unit without an effect"
    ):
        parameter_kinds(Ordered("stem blocks head", side_head=True))


def test_parameters_that_are_not_used_are_refused_or_stated() -> None:
    model = Ordered("stem blocks head")
    model.auxiliary = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"'auxiliary.weight' that the forward pass in eval mode does not use"):
        parameter_kinds(model)
    inside = Ordered("stem blocks head")
    inside.blocks[0].mlp.spare = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match=r"does not use have their unit's kind: blocks.0.mlp.spare"):
        assert parameter_kinds(inside)["blocks.0.mlp.spare"] == "mlp"


def test_a_compiled_model_has_the_kinds_of_its_module() -> None:
    model = Ordered("head stem blocks")
    compiled = torch.compile(model, backend="eager")
    assert list(parameter_kinds(compiled)) == [name for name, _ in compiled.named_parameters()]
    assert list(parameter_kinds(compiled).values()) == list(parameter_kinds(model).values())


class CrossStage(nn.Module):
    """Two ways of which one holds blocks; the blocks of the last stage have no shortcut, as in CSPNeXt."""

    class Block(nn.Module):
        def __init__(self, width: int, shortcut: bool) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.shortcut = shortcut

        def forward(self, x: Tensor) -> Tensor:
            branch = self.conv2(F.relu(self.conv1(x)))
            return x + branch if self.shortcut else branch

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.main, self.short = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.blocks = nn.Sequential(*(self.Block(width, shortcut) for _ in range(3)))
        self.final = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        return F.relu(self.final(torch.cat([self.blocks(self.main(x)), self.short(x)], dim=1)))


def test_what_a_stage_makes_of_its_blocks_is_no_head() -> None:
    stages = [CrossStage(8, shortcut) for shortcut in (True, True, False)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    kinds = parameter_kinds(model, torch.randn(1, 3, 32, 32))
    assert {name for name, kind in kinds.items() if kind == "head"} == {"6.weight", "6.bias"}
    assert {kinds[name] for name, _ in model.named_parameters() if name.startswith("3.")} == {"conv", "pool"}


@pytest.mark.parametrize("name", timm_versions.named("cspnext_m", "cspresnet50", "cs3darknet_m"))
def test_the_head_of_a_cross_stage_network_is_its_classifier(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    kinds = parameter_kinds(model)
    classifier = {f"head.fc.{part}" for part in ("weight", "bias")}
    assert {name for name, kind in kinds.items() if kind == "head"} == classifier
