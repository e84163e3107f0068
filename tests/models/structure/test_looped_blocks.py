"""Networks that run one block several times on the stream and on their first tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fixtures.networks.own_networks import PLACES, Block, Tokens, check


class Looped(Tokens):
    """Three passes through one block, each of which is given the sum of the stream and the tokens of the stem."""

    def forward(self, x: Tensor) -> Tensor:
        first = stream = self.patches(x).flatten(2).mT
        for _ in range(3):
            stream = self.blocks[0](stream + first)
        return self.classifier(self.norm(stream)[:, 0])


def test_a_sum_with_the_stem_is_no_unit_around_the_first_pass() -> None:
    torch.manual_seed(0)
    model = Looped(Block())
    del model.token
    check(model, ["msa", "mlp"] * 3, PLACES)
