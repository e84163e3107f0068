"""The softmax weights of attention that a forward pass shows: of whole maps, windows and masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fixtures.configs.model_configs import from_config
from vitscope import models
from vitscope.models.structure.attention_weights import attention_weights, reading_attention
from vitscope.models.structure.residual_units import units


def image() -> Tensor:
    return torch.rand(2, 3, 32, 32, dtype=torch.float64)


def test_attention_weights_reproduce_the_attention_of_a_vit() -> None:
    model = models.vit(patch_size=8, depth=2).double().eval()
    read: dict[str, Tensor] = {}
    with torch.no_grad():
        clean = model(x := image())
        with reading_attention(units(model), lambda i, unit, w: read.update({unit.name: w})):
            assert (model(x) - clean).abs().max() < 1e-12
        block = model.blocks[0]
        tokens = block.norm1(model._pos_embed(model.patch_embed(x)))
        q, k, _ = block.attn.qkv(tokens).reshape(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
    assert list(read) == ["blocks.0.attn", "blocks.1.attn"]
    assert (read["blocks.0.attn"] - (q @ k.mT / 8).softmax(-1)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "shape"), [("alternet", (2 * 16, 6, 16, 16)), ("swin", (2 * 16, 3, 16, 16)), ("convit", (2, 3, 64, 64))]
)
def test_attention_weights_of_windows_and_neighborhoods(name: str, shape: tuple) -> None:
    model = from_config(name)
    read: list[Tensor] = []
    found = units(model)
    with torch.no_grad(), reading_attention(found, lambda i, unit, w: read.append(w)):
        model(image())
    first = next(u for u in found if u.kind == "msa")
    assert read[0].shape == shape
    assert first.window == (None if name == "convit" else (4, 4))
    assert all((w.sum(-1) - 1).abs().max() < 1e-12 for w in read)
    assert len(read) == sum(u.kind == "msa" for u in found)


def test_unfused_attention_is_read_too_and_left_unfused() -> None:
    model = models.vit(patch_size=8, depth=1).double().eval()
    model.blocks[0].attn.fused_attn = False
    read: list[Tensor] = []
    with torch.no_grad(), reading_attention(units(model), lambda i, unit, w: read.append(w)):
        model(image())
    assert len(read) == 1
    assert model.blocks[0].attn.fused_attn is False


def test_attention_weights_take_boolean_and_additive_masks_and_a_scale() -> None:
    q, k, v = torch.randn(3, 2, 1, 4, 5, dtype=torch.float64)
    seen = torch.ones(4, 4).tril().bool()
    for mask in (seen, torch.randn(4, 4, dtype=torch.float64), None):
        weights = attention_weights(q, k, v, attn_mask=mask, scale=0.3)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        assert (weights @ v - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="full, ungrouped attention only"):
        attention_weights(q, k, v, is_causal=True)
