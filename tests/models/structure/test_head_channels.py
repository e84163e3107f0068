"""Attention of one's own is removed head by head wherever its projection takes the channels of a head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fixtures.networks.own_networks import Block, C, Tokens, X
from vitscope.models.structure.residual_units import head_zeroed, units
from vitscope.runtime.errors import StructureError

HEADS = 4


class Attention(nn.Module):
    """Attention that gives its heads to the projection one after the other, in turn, or behind a norm over all channels."""

    num_heads = HEADS

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.LayerNorm(C)
        self.way, self.removed = way, HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))  # (B, heads, L, d)
        out = F.scaled_dot_product_attention(q, k, v)
        out = torch.stack([head * (i != self.removed) for i, head in enumerate(out.unbind(1))], 1)
        if self.way == "in turn":
            return self.proj(out.permute(0, 2, 3, 1).flatten(2))
        out = out.transpose(1, 2).flatten(2)
        return self.proj(self.norm(out) if self.way == "norm" else out)


@pytest.mark.parametrize("way", ["one after the other", "in turn"])
def test_a_head_is_removed_where_its_channels_are(way: str) -> None:
    attention = Attention(way)
    model = Tokens(Block("pre", lambda: attention)).double().eval()
    unit = units(model, X)[0]
    assert unit.n_heads == HEADS
    with torch.no_grad():
        for head in range(HEADS):
            attention.removed = head
            expected = model(X)
            attention.removed = HEADS
            with head_zeroed(unit, head):
                torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-13)


def test_heads_behind_a_norm_are_refused() -> None:
    model = Tokens(Block("pre", lambda: Attention("norm"))).double().eval()
    unit = units(model, X)[0]
    with (
        torch.no_grad(),
        pytest.raises(StructureError, match=r"blocks\.0\.mixer: the pass does not show which channels"),
        head_zeroed(unit, 0),
    ):
        model(X)
