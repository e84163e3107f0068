"""Own networks made of timm's blocks: class tokens in front of the patches and behind them, tokens that are written."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitscope.models.structure.residual_units import Unit, reading_branches, units
from vitscope.models.structure.taps import reading, taps


class Network(nn.Module):
    """A transformer of one block with a class token in front of the patches or behind them."""

    def __init__(self, is_behind: bool, n_tokens: int | None) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 8, 4, 4), Block(8, 2), nn.Linear(8, 3)
        self.cls_token, self.is_behind = nn.Parameter(torch.rand(1, 1, 8)), is_behind
        if n_tokens is not None:
            self.num_tokens = n_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, 3)``."""
        patches = self.patches(x).flatten(2).mT
        token = self.cls_token.expand(len(x), -1, -1)
        tokens = self.block(torch.cat((patches, token) if self.is_behind else (token, patches), 1))
        return self.head(tokens[:, -1 if self.is_behind else 0])


class Written(nn.Module):
    """A transformer that writes its patches into a new tensor, with a residual branch of its own behind timm's block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 8, 4, 4), Block(8, 2), nn.Linear(8, 3)
        self.own = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, 3)``."""
        patches = self.patches(x).flatten(2).mT
        tokens = torch.zeros(patches.shape, dtype=x.dtype)
        tokens[:, :] = patches
        tokens = self.block(tokens)
        return self.head((tokens + self.own(tokens)).mean(1))


def test_units_behind_values_that_are_written_are_found() -> None:
    found = units(Written().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64))
    assert [unit.name for unit in found] == ["block.attn", "block.mlp", "own"]


@pytest.mark.parametrize("n_tokens", [None, 17])
@pytest.mark.parametrize("is_behind", [False, True])
@torch.no_grad()
def test_maps_hold_the_patches_alone(is_behind: bool, n_tokens: int | None) -> None:
    model = Network(is_behind, n_tokens).double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    maps: dict[str, Tensor] = {}
    with reading(model, taps(model, x), lambda _, tap, value: maps.update({tap.name: value.clone()})):
        model(x)
    assert torch.equal(maps["stem"], model.patches(x))
    branches: dict[tuple[str, str], Tensor] = {}

    def keep(_: int, unit: Unit, side: str, value: Tensor) -> None:
        branches[unit.kind, side] = value.clone()

    with reading_branches(model, units(model, x), keep):
        model(x)
    expected = model.block.norm1(model.patches(x).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(branches["msa", "input"], expected, rtol=0, atol=1e-14)  # the same sums


@torch.no_grad()
def test_tokens_in_front_are_left_out_at_any_size() -> None:
    model = Network(False, None).eval()
    found = taps(model, torch.rand(1, 3, 16, 16))
    sizes = []
    with reading(model, found, lambda _, tap, value: sizes.append(tuple(value.shape))):
        model(torch.rand(2, 3, 24, 16))
    assert sizes == [(2, 8, 6, 4)] * 3
