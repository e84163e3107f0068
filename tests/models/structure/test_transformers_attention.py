"""Attention of transformers' models, fused and eager, against the weights that the models themselves return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.networks.transformers_models import FAMILIES, built, images
from vitscope.models.structure.attention_units import AttentionUnit, attention_units, reading_attention_units

#: prefix tokens, windows, and grids of queries and keys of the first unit by family
EXPECTED = {
    "vit": (1, 1, (4, 4), (4, 4)),
    "deit": (2, 1, (4, 4), (4, 4)),
    "dinov2_with_registers": (5, 1, (4, 4), (4, 4)),
    "clip": (1, 1, (4, 4), (4, 4)),
    "siglip": (0, 1, (4, 4), (4, 4)),
    "swin": (0, 4, (8, 8), (8, 8)),
    "swinv2": (0, 4, (8, 8), (8, 8)),
    "segformer": (0, 1, (8, 8), (4, 4)),
}


def weights_of(model: nn.Module, units: list[AttentionUnit], x: Tensor) -> list[Tensor]:
    read: list[Tensor] = []
    with torch.no_grad(), reading_attention_units(units, lambda i, unit, w: read.append(w.clone())):
        model(x)
    return read


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_are_those_that_the_model_returns(name: str) -> None:
    model: Any = built(name)
    x = images(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(x, output_attentions=True).attentions
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        units, reasons = attention_units(model, x)
        assert not reasons
        first = units[0]
        assert int((first.queries[..., 0] < 0).sum()) == EXPECTED[name][0]
        assert (first.n_windows, first.query_grid, first.key_grid) == EXPECTED[name][1:]
        read = weights_of(model, units, x)
        if name.startswith("swin"):  # they return one array per stage, of its last unit
            read = [read[0], read[-1]]
        assert len(read) == len(expected)
        for weights, own in zip(read, expected):
            # eager attention takes its softmax in float32
            torch.testing.assert_close(weights.double(), own.double(), rtol=1e-5, atol=1e-6)


def test_families_without_attention_have_none() -> None:
    assert {"convnext", "convnextv2"} <= set(FAMILIES)
    for name in ("convnext", "convnextv2"):
        assert attention_units(built(name), images(name)) == ([], {})
