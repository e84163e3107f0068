"""Mixing of positions without a softmax over them: refused by name, or an MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import Attention, Block, C, Feed, N, Tokens, X, check
from vitscope.models.structure.residual_units import units
from vitscope.runtime.errors import StructureError


class FullAttentionFree(nn.Module):
    """AFT-full: a table of positions weighs exponentials of the keys and their products with the values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(N + 1, N + 1))
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        table, keys = torch.exp(self.table), torch.exp(self.k(x))
        return torch.sigmoid(self.q(x)) * ((table @ (keys * self.v(x))) / (table @ keys))


class Recurrent(nn.Module):
    """Linear attention from token to token, with a state of products of keys and values."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        state, results, written = torch.zeros_like(v[:, 0]), [], torch.zeros_like(v)
        for t in range(x.shape[1]):
            state = 0.9 * state + torch.exp(k[:, t]) * v[:, t]
            if self.write:
                written[:, t] = q[:, t] * state
            results.append(q[:, t] * state)
        return written if self.write else torch.stack(results, 1)


class Scan(nn.Module):
    """A diagonal state-space model whose states are running sums, or running sums of exponentials of logarithms."""

    def __init__(self, logarithms: bool) -> None:
        super().__init__()
        self.logarithms = logarithms
        self.step, self.value, self.out = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        decay = F.softplus(self.step(x)).cumsum(1)
        if self.logarithms:
            return self.out((torch.logcumsumexp(decay + F.softplus(self.value(x)).log(), 1) - decay).exp())
        return self.out((-decay).exp() * (decay.exp() * self.value(x)).cumsum(1))


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        (FullAttentionFree, "mixes positions by a table"),
        (lambda: Recurrent(write=False), "from position to position"),
        (lambda: Recurrent(write=True), "from position to position"),
        (lambda: Scan(logarithms=False), "from position to position"),
        (lambda: Scan(logarithms=True), "from position to position"),
    ],
)
def test_relatives_of_attention_without_a_softmax_are_refused_by_name(mixer, reason: str) -> None:
    model = Tokens(Block("pre", mixer)).double().eval()
    with pytest.raises(StructureError, match=rf"the kind of blocks\.0\.mixer is not certain: .*{reason}"):
        vs.structure(model, X).check()
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer"):
        units(model, X)


class Gated(nn.Module):
    """gMLP's gate: a layer over positions, then a product."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.over, self.narrow = nn.Linear(C, 2 * C), nn.Conv1d(N + 1, N + 1, 1), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.gelu(self.wide(x)).chunk(2, -1)
        return self.narrow(a * self.over(b))


class Experts(nn.Module):
    """A mixture of three experts by a softmax of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(C, 3), nn.ModuleList(Feed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return (torch.stack([expert(x * weights[..., :1]) for expert in self.experts], -1) * weights[:, :, None]).sum(
            -1
        )


class GatedAttention(Attention):
    """Attention whose result is multiplied by a gate of the values before the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.three(x).chunk(3, -1)
        )  # (B, heads, L, C / heads)
        out = (q @ k.mT).softmax(-1) @ v * torch.sigmoid(v)
        return self.back(out.transpose(1, 2).flatten(2))


def test_a_gate_of_attention_is_no_mlp(recwarn) -> None:
    model = Tokens(Block("pre", GatedAttention)).double().eval()
    assert vs.structure(model, X).parameter_kinds["blocks.0.mixer.back.weight"] == "msa"
    assert [str(warning.message) for warning in recwarn if "holds attention and an MLP" in str(warning.message)] == []


@pytest.mark.parametrize("mixer", [Gated, Experts])
def test_gates_and_experts_stay_mlps(mixer) -> None:
    check(
        Tokens(Block("pre", mixer), Block()),
        ["mlp", "mlp", "msa", "mlp"],
        {"blocks.0.*": "mlp", "blocks.1.mixer.*": "msa"},
    )
