"""Networks that users write: kinds of every parameter, and lesions that equal a branch set to zero in the network's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import PLACES, B, Block, Branches, C, Feed, N, Tokens, X, check
from vitscope.linalg.curvature.parameter_subsets import select_parameters
from vitscope.models.structure.residual_units import reading_branches, units
from vitscope.runtime.errors import StructureError


@pytest.mark.parametrize("way", ["pre", "post", "deep norm", "in place", "stack", "scale"])
def test_ways_to_add_a_branch(way: str) -> None:
    check(Tokens(Block(way), Block(way)), ["msa", "mlp"] * 2, PLACES)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), 1, 1, dtype=x.dtype) + (1 - rate)
    return x / (1 - rate) * kept.floor()


class Scaled(Block):
    """Layer scale and stochastic depth in the block's own code, beside an addition that is no unit's, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__("scale")
        self.written, self.bias = way, nn.Parameter(torch.rand(C))
        if way == "no module":
            del self.mixer, self.gamma

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.bias
        if self.written == "no module":
            x = x + B(torch.fft.fft2(y).real)
        elif self.written == "in place":
            branch = self.gamma * self.mixer(y)
            branch = B(branch).clone()
            branch += x
            x = branch
        elif self.written == "function":
            x = torch.add(x, other=B(drop_path(self.gamma * self.mixer(y), 0.1, self.training)))
        else:
            x = B(self.mixer(y).mul(self.gamma)) + x
        return x + B(drop_path(self.delta * self.feed(self.b(x)), 0.1, self.training))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("way", ["no module", "in place", "function", "branch first"])
def test_a_scaled_branch_is_read_and_removed_where_it_is_added(way: str, twice: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    block = Scaled(way)
    model = Tokens(block, block if twice else Scaled(way))
    first = "conv" if way == "no module" else "msa"
    check(model, [first, "mlp"] * 2, {"blocks.*.delta": "mlp", "blocks.*.gamma": "msa"} if first == "msa" else {})
    found = units(model, X)
    branches: list[Tensor] = []
    maps: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def keep(i: int, unit: object, side: str, value: Tensor) -> None:
        if side == "output":
            maps[i].append(value - 0.0 * value.mean())  # sums of a reader are not counted

    monkeypatch.setattr(Branches, "__call__", lambda _, branch: (branches.append(branch.clone()), branch)[1])
    with torch.no_grad():
        for _ in range(2):
            with reading_branches(model, found, keep):
                model(X)
    for i in range(4):
        for number, value in enumerate(maps[i]):
            tokens = branches[4 * number + i][:, 1:]  # (B, N, C) without the class token
            assert torch.equal(value, tokens.mT.unflatten(2, (4, 6)))
        assert len(maps[i]) == 2


@pytest.mark.parametrize("way", ["no module", "function"])
def test_measures_of_scaled_branches(way: str) -> None:
    torch.manual_seed(0)
    scaled = Tokens(Scaled(way), Scaled(way)).eval()
    probe = vs.Probe(scaled, [(X.float(), torch.tensor([0, 1]))])
    transfer, lesions = vs.branch_transfer(probe), vs.lesion(probe)
    kinds = ["conv" if way == "no module" else "msa", "mlp"] * 2
    assert list(transfer.kinds) == kinds
    assert np.isfinite(np.concatenate([np.asarray(curve) for curve in transfer.transfer])).all()
    targets, changes = torch.tensor([0, 1]), []
    with torch.no_grad():
        for removed in ({9}, *({i} for i in range(4))):
            B.number, B.removed = 0, frozenset(removed)
            changes.append(float(F.cross_entropy(scaled(X.float()), targets)))
    B.removed = frozenset()
    # losses near 2 in float32
    np.testing.assert_allclose(lesions.nll_change, np.array(changes[1:]) - changes[0], atol=1e-5)


def test_an_addition_of_other_tensors_than_in_the_traced_pass_is_refused() -> None:
    model = Tokens(Scaled("function")).double().eval()
    found = units(model, X)
    model.train()  # stochastic depth adds a number to random numbers
    with (
        torch.no_grad(),
        pytest.raises(StructureError, match="adds other tensors"),
        reading_branches(model, found[:1], lambda *_: None),
    ):
        model(X)


@pytest.mark.parametrize("head", ["residual", "query"])
def test_what_follows_the_last_unit_is_the_head(head: str) -> None:
    check(Tokens(Block(), head=head), ["msa", "mlp"], PLACES)


class TokensFirst(nn.Module):
    """A block of `torch.nn.MultiheadAttention` that takes (tokens, images, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mixer, self.b, self.feed = nn.LayerNorm(C), nn.MultiheadAttention(C, 2), nn.LayerNorm(C), Feed()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = x + B(self.mixer(y, y, y)[0])
        return x + B(self.feed(self.b(x)))


@torch.no_grad()
def test_tokens_before_images_are_read_as_maps() -> None:
    model = Tokens(TokensFirst(), TokensFirst(), first=True)
    check(model, ["msa", "mlp"] * 2, PLACES)
    maps: dict[str, Tensor] = {}
    found = vs.taps(model, X)
    with vs.models.structure.reading(model, found, lambda i, tap, x: maps.update({tap.name: x.clone()})):
        model(X)
    assert [tap.layout for tap in found] == ["LNC"] * 5
    stream = model.patches(X).flatten(2).mT
    stream = torch.cat((model.token.expand(2, -1, -1), stream), 1).transpose(0, 1)
    for block, tap in zip(model.blocks, found[2::2]):
        stream = block(stream)
        expected = stream[1:].permute(1, 2, 0).reshape(2, C, 4, 6)
        assert torch.equal(maps[tap.name], expected)


class Fixed(Tokens):
    """Position embeddings of one size of images, and a convolution behind the tokens."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        del self.token, self.norm, self.classifier
        self.positions, self.map = nn.Parameter(torch.rand(1, N, C)), nn.Conv2d(C, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x)
        return self.map(x.mT.unflatten(2, (4, 6)))


def test_a_network_whose_pass_fails_is_not_read_at_its_convolutions() -> None:
    model = Fixed().double().eval()
    with pytest.raises(StructureError, match="its forward pass fails: .*pass images that it takes"):
        vs.structure(model)
    assert "msa" in vs.structure(model, X).parameter_kinds.values()
    chosen = select_parameters(model, dict(model.named_parameters()), "kind:msa", lambda: X)
    assert {name.split(".")[2] for name in chosen} == {"mixer", "a"}
