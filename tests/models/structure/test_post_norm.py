"""Maps of post-norm transformers are read behind the norms, where the next unit adds to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import Block, C, Tokens, X
from vitscope.models.structure.taps import reading


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(C, 2, 2 * C, dropout=0.0, batch_first=True, norm_first=False)


@pytest.mark.parametrize(
    ("make", "norms"), [(lambda: Block("post"), ("a", "b")), (encoder_layer, ("norm1", "norm2"))], ids=["own", "torch"]
)
def test_every_half_is_read_behind_its_norm(make, norms: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = Tokens(make(), make()).double().eval()
    taps = vs.taps(model, X)
    read: dict[int, Tensor] = {}
    normalized: list[Tensor] = []
    for block in model.blocks:
        for name in norms:
            block.get_submodule(name).register_forward_hook(lambda _, __, output: normalized.append(output.clone()))
    for p in model.parameters():
        p.requires_grad_()  # torch's layer then calls its modules
    with reading(model, taps, lambda i, tap, x: read.update({i: x.detach().clone()})):
        model(X)
    assert [tap.kind for tap in taps] == ["stem", "msa", "mlp", "msa", "mlp"]
    for i, tokens in enumerate(normalized, 1):
        torch.testing.assert_close(read[i], tokens.detach()[:, 1:].mT.unflatten(2, (4, 6)), rtol=0, atol=0)


def test_pre_norm_halves_are_read_before_the_norm() -> None:
    model = Tokens(Block(), Block()).double().eval()
    places = [(tap.at, tap.module) for tap in vs.taps(model, X)]
    assert places[1:] == [
        ("input", model.blocks[0].b),
        ("output", model.blocks[0]),
        ("input", model.blocks[1].b),
        ("output", model.blocks[1]),
    ]
