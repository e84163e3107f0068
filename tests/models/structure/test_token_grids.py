"""Conversion of tokens to maps: layouts, grids, prefix tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tests.fixtures.oracles.feature_maps import image, maps
from vitscope.models.structure.feature_maps import ForwardPass, to_map, token_grid
from vitscope.models.structure.taps import taps


def shown(*sizes: tuple[int, int]) -> ForwardPass:
    result = ForwardPass()
    result.sizes.update(sizes)
    return result


def test_layouts_become_maps() -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = x.flatten(2)
    prefixed = torch.cat((torch.zeros(2, 2, 3, dtype=x.dtype), tokens.mT), 1)
    assert torch.equal(to_map(x.permute(0, 2, 3, 1), "t", "NHWC", 0, None, shown()), x)
    assert torch.equal(to_map(prefixed, "t", "NLC", 2, (4, 5), shown()), x)
    assert torch.equal(to_map(tokens, "t", "NCL", 0, None, shown((8, 8), (4, 5))), x)


def test_token_grids_are_declared_or_observed() -> None:
    assert token_grid("t", 64, 0, None, [(8, 8), (16, 16)]) == (8, 8)
    assert token_grid("t", 65, 1, None, [(4, 16)]) == (4, 16)
    assert token_grid("t", 64, 0, (4, 16), [(8, 8)]) == (4, 16)
    refusals = [
        ((65, 0, None, [(8, 8)]), r"65 tokens, 0 of them .* has a map of 65 positions \(maps seen: 8x8\)"),
        ((64, 0, None, []), r"maps seen: none"),
        ((16, 0, None, [(4, 4), (2, 8)]), r"fit several maps of the forward pass \(2x8, 4x4\)"),
        ((64, 0, (14, 14), [(8, 8)]), r"a declared grid of 14x14"),
    ]
    for arguments, text in refusals:
        with pytest.raises(ValueError, match=text):
            token_grid("t", *arguments)


def test_the_grid_a_model_was_built_for_is_not_that_of_other_images() -> None:
    built = VisionTransformer(
        64, 16, num_classes=3, embed_dim=12, depth=1, num_heads=2, class_token=False, global_pool="avg"
    )
    built.patch_embed.strict_img_size = False
    read = maps(built.double().eval(), image(32, 128))
    assert all(value.shape == (2, 12, 2, 8) for value in read.values())


class Registers(VisionTransformer):
    """Puts tokens in front that it does not declare, as many as ``tokens``."""

    tokens = 1

    def _pos_embed(self, x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(len(x), self.tokens, x.shape[2]), x + self.pos_embed), 1)


@pytest.mark.parametrize(("side", "tokens"), [(64, 1), (64, 4), (64, 17), (32, 5)])
def test_undeclared_prefix_tokens_are_refused(side: int, tokens: int) -> None:
    options = {"embed_dim": 12, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    model = Registers(side, 8 if side == 64 else 16, num_classes=3, **options).double().eval()
    model.tokens = tokens
    n = (64 if side == 64 else 4) + tokens
    with pytest.raises(ValueError, match=f"received {n} tokens, 0 of them declared as prefix tokens"):
        maps(model, image(side, side))
    own = [replace(tap, n_prefix=tokens) for tap in taps(model)]
    assert maps(model, image(side, side), own)["blocks.0.mlp"].shape[1] == 12


def test_tokens_that_are_parameters_are_counted() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 12, 8, 8)
            self.cls_token, self.reg_token = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 3, 12))
            self.blocks = nn.Sequential(Block(12, 2), Block(12, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT
            front = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token)]
            return self.blocks(torch.cat((*front, x), 1)).mean(1)

    model = Tokens().double().eval()
    read = maps(model, image(32, 16))
    x = image(32, 16)
    read = maps(model, x)
    patches = model.embed(x)
    assert torch.equal(read["stem"], patches)


def test_a_module_that_runs_twice_has_no_map() -> None:
    class Twice(VisionTransformer):
        def forward_features(self, x: Tensor, **_: object) -> Tensor:
            x = self._pos_embed(self.patch_embed(x))
            return self.norm(self.blocks[0](self.blocks[0](x)))

    model = Twice(16, 8, num_classes=3, embed_dim=12, depth=1, num_heads=2).double().eval()
    with pytest.raises(ValueError, match=r"'blocks.0.attn' to run once in a forward pass"):
        maps(model, image(16, 16), taps(model)[1:])


def test_images_of_another_size_than_the_model_was_built_for() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, dynamic_img_size=True).double().eval()
    assert maps(model, image(32, 96))["blocks.0.mlp"].shape == (2, 192, 2, 6)
