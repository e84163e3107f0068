"""Sums that no module returns are read at their number, whatever a measure computes while it reads another tap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.tap import Tap
from vitscope.models.structure.taps import reading, taps


class ConvThenAttention(nn.Module):
    """Convolutions, then self-attention and an MLP whose sums are taken in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)
        self.sums: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.second(self.norm(self.first(images)).relu()).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        after_attention = tokens
        tokens = tokens + self.mlp(tokens)
        self.sums = [after_attention.detach(), tokens.detach()]
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("n_additions", [0, 1, 2])
def test_arithmetic_of_a_reader_is_not_counted(n_additions: int) -> None:
    torch.manual_seed(0)
    model, images = ConvThenAttention().eval(), torch.rand(4, 3, 16, 16)
    found = taps(model, images)
    maps: dict[str, Tensor] = {}

    def read(index: int, tap: Tap, feature_map: Tensor) -> None:
        maps[tap.kind] = feature_map.clone()
        for _ in range(n_additions):
            feature_map = feature_map - feature_map.mean()  # a sum of the measure, in a hook of the model

    with torch.no_grad(), reading(model, found, read):
        model(images)
    assert [tap.kind for tap in found if tap.at == "sum"] == ["mlp"]  # that of the attention is the MLP's input
    for kind, tokens in zip(("msa", "mlp"), model.sums):
        # (B, N, C) to (B, C, h, w)
        torch.testing.assert_close(maps[kind], tokens.transpose(1, 2).reshape(4, 16, 8, 8), rtol=0, atol=0)


def test_measures_of_an_own_network_with_attention() -> None:
    torch.manual_seed(0)
    model = ConvThenAttention()
    images = torch.rand(8, 3, 16, 16)
    probe = vs.Probe(model, [(images, torch.randint(10, (8,)))])
    result = vs.feature_map_variance(probe)
    model.eval()
    with torch.no_grad():
        model(images)
    expected = [tokens.double().var(1).mean().item() for tokens in model.sums]
    variances = dict(zip(result.kinds, result.variance))
    # sums of 64 float32 values: relative rounding of some 64 * 6e-8
    assert variances["msa"] == pytest.approx(expected[0], rel=1e-5)
    assert variances["mlp"] == pytest.approx(expected[1], rel=1e-5)
