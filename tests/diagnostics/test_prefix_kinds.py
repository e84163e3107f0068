"""Kinds of prefix tokens: each token of a kind is marked in its parameter and found at its place of the sequence."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from vitscope import models
from vitscope.diagnostics.tokens._prefix_kinds import KINDS, prefix_kinds
from vitscope.models.structure.taps import reading, taps

NETWORKS = {
    "class": lambda: models.vit(patch_size=16, depth=1),
    "class, 2 registers": lambda: models.vit(patch_size=16, depth=1, reg_tokens=2),
    "2 registers": lambda: models.vit(patch_size=16, depth=1, reg_tokens=2, pool="gap"),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
    "eva": lambda: timm.create_model(
        "eva02_tiny_patch14_224", img_size=32, patch_size=16, depth=1, num_reg_tokens=3, num_classes=2
    ),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 16, 1, 3, 48, 96),
}
EXPECTED = {
    "class": ("class",),
    "class, 2 registers": ("class", "register", "register"),
    "2 registers": ("register", "register"),
    "distilled": ("class", "distillation"),
    "eva": ("class", "register", "register", "register"),
    "torchvision": ("class",),
}
MARKS = {"class": 1e3, "distillation": 1e4, "register": 1e5}


@pytest.mark.parametrize("name", NETWORKS)
def test_kinds_are_those_of_the_parameters_that_stand_there(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for kind, names in KINDS.items():
            for attribute in names:
                if isinstance(token := getattr(network, attribute, None), nn.Parameter):
                    token.fill_(MARKS[kind])
    stem: list[Tensor] = []
    found = taps(network)[:1]
    with torch.no_grad(), reading(network, found, lambda *_: None, lambda _i, _tap, tokens: stem.append(tokens)):
        network(torch.randn(1, 3, 32, 32))
    (tokens,) = stem
    assert prefix_kinds(network, tokens.shape[1]) == EXPECTED[name]
    for token, kind in zip(tokens[0], EXPECTED[name], strict=True):
        torch.testing.assert_close(token, torch.full_like(token, MARKS[kind]), rtol=0.01, atol=0)


def test_kinds_are_unknown_where_the_tokens_of_the_model_are_others() -> None:
    network = models.vit(patch_size=16, depth=1)
    assert prefix_kinds(network, 3) == ("unknown",) * 3
    assert prefix_kinds(network, 0) == ()
    assert prefix_kinds(nn.Linear(2, 2), 1) == ("unknown",)
