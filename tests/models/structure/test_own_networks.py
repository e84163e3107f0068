"""Networks that users write: kinds of every parameter, and lesions that equal a branch set to zero in the network's own code."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.linalg.curvature.parameter_subsets import select_parameters
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import reading_branches, units, zeroed
from vitscope.runtime.errors import StructureError

C, N = 16, 24  # channels; 4 x 6 patches of the images
X = torch.rand(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Branches:
    """The branches of a pass by number, of which some are multiplied by zero: an own lesion inside the network's code."""

    removed: frozenset[int] = frozenset()
    number = 0

    def __call__(self, branch: Tensor) -> Tensor:
        number, self.number = self.number, self.number + 1
        return branch * 0 if number in self.removed else branch


B = Branches()


class Attention(nn.Module):
    """Attention of two heads by einsum, under names that do not tell it."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.back = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, -1)) for t in self.three(x).chunk(3, -1))  # (B, L, heads, C / heads)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.back(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Block(nn.Module):
    """Attention and MLP that are added in one of several ways."""

    def __init__(self, way: str = "pre", mixer: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.way, self.mixer, self.feed = way, mixer(), Feed()
        self.a, self.b = nn.LayerNorm(C), nn.LayerNorm(C)
        if way == "scale":
            self.gamma, self.delta = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "post":
            x = self.a(x + B(self.mixer(x)))
            return self.b(x + B(self.feed(x)))
        if self.way == "deep norm":
            x = self.a(1.5 * x + B(self.mixer(x)))
            return self.b(1.5 * x + B(self.feed(x)))
        if self.way == "in place":
            x = x.clone()
            x += B(self.mixer(self.a(x)))
            x += B(self.feed(self.b(x)))
            return x
        if self.way == "stack":
            x = torch.stack((x, B(self.mixer(self.a(x))))).sum(0)
            return torch.stack((x, B(self.feed(self.b(x)))), 1).sum(dim=1)
        if self.way == "scale":
            x = x + B(self.gamma * self.mixer(self.a(x)))
            return x + B(self.delta * self.feed(self.b(x)))
        x = x.add(B(self.mixer(self.a(x))))
        return torch.add(x, B(self.feed(self.b(x))))


class Tokens(nn.Module):
    """Patches, a class token, blocks and a classifier; ``first`` puts tokens before images."""

    def __init__(self, *blocks: nn.Module, first: bool = False, head: str = "token") -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, C, 4, 4), nn.Parameter(torch.rand(1, 1, C))
        self.blocks, self.norm, self.classifier = nn.ModuleList(blocks), nn.LayerNorm(C), nn.Linear(C, 4)
        self.first, self.head = first, head
        if head == "residual":
            self.last = Feed()
        if head == "query":
            self.query, self.pooling = nn.Parameter(torch.rand(1, 1, C)), nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        x = x.transpose(0, 1) if self.first else x
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 1) if self.first else x
        if self.head == "query":
            x = self.pooling(self.query.expand(len(x), -1, -1), x, x)[0]
        y = self.norm(x)[:, 0]
        return self.classifier(y + self.last(y) if self.head == "residual" else y)


def check(model: nn.Module, kinds: list[str], places: dict[str, str], x: Tensor = X) -> None:
    """Compare units and kinds with those expected, and each lesion with that of the network's own code."""
    model.double().eval()
    structure = vs.structure(model, x)
    structure.check()
    assert [unit.kind for unit in units(model, x)] == kinds
    assert set(structure.parameter_kinds) == {name for name, _ in model.named_parameters()}
    for name, kind in structure.parameter_kinds.items():
        expected = next((place for pattern, place in places.items() if fnmatch(name, pattern)), None)
        assert expected in (None, kind), (name, kind, expected)
    with torch.no_grad():
        for i, unit in enumerate(units(model, x)):
            B.number, B.removed = 0, frozenset({i})
            expected_output = model(x)
            B.number, B.removed = 0, frozenset()
            with zeroed(unit):
                output = model(x)
            assert B.number == len(kinds)
            assert (output - expected_output).abs().max() < 1e-10, unit.name


PLACES = {
    "patches.*": "stem", "token": "stem", "blocks.*.mixer.*": "msa", "blocks.*.a.*": "msa", "blocks.*.feed.*": "mlp",
    "blocks.*.b.*": "mlp", "norm.*": "head", "classifier.*": "head", "last.*": "head", "query": "head", "pooling.*": "head",
}  # fmt: skip


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


class Conv(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(n, n, 3, 1, 1), nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + B(self.two(F.relu(self.norm(self.one(x))))))


class Mixing(nn.Module):
    """Attention of pixels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.three, self.back = nn.Conv2d(n, 3 * n, 1), nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.three(x).flatten(2).chunk(3, 1)
        return x + B(self.back((v @ (q.mT @ k).softmax(-1).mT).view_as(x)))


class UNet(nn.Module):
    """A U-Net that adds its skips, with attention on the smallest map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, C, 2, 2), nn.ConvTranspose2d(C, C, 2, 2)
        self.first, self.second, self.middle, self.third = Conv(C), Conv(C), Mixing(C), Conv(C)
        self.classifier = nn.Conv2d(C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(self.stem(x))
        return self.classifier(self.third(wide + self.up(self.middle(self.second(self.down(wide))))))


def test_the_skips_of_a_u_net_are_no_units() -> None:
    places = {"first.*": "conv", "second.*": "conv", "middle.*": "msa", "third.*": "conv", "up.*": "conv"}
    check(UNet(), ["conv", "conv", "msa", "conv"], {**places, "stem.*": "stem", "classifier.*": "head"})


class PlainUNet(nn.Module):
    """A U-Net of plain convolutions that concatenates its skips; its attention alone is residual."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.second, self.third = self.pair(3, n), self.pair(n, n), self.pair(2 * n, n)
        self.middle, self.classifier = Mixing(n), nn.Conv2d(n, 4, 1)

    @staticmethod
    def pair(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 1, 1), nn.ReLU(), nn.Conv2d(n_out, n_out, 3, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x)
        narrow = F.interpolate(self.middle(self.second(F.max_pool2d(wide, 2))), scale_factor=2)
        return self.classifier(self.third(torch.cat((wide, narrow), 1)))


def test_an_encoder_and_a_decoder_outside_of_residual_units_are_named() -> None:
    model = PlainUNet(C).double().eval()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shares = [
        sum(n for name, n in sizes.items() if name.startswith(places)) / sum(sizes.values())
        for places in (("first.", "second."), "third.")
    ]
    message = rf"hold most of the parameters: 4 of stem \({shares[0]:.0%}\) and 2 of head \({shares[1]:.0%}\)"
    for read in (lambda: vs.structure(model, X), lambda: vs.taps(model, X), lambda: parameter_kinds(model, X)):
        with pytest.warns(UserWarning, match=message) as notices:
            read()
        assert len(notices) == 1


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


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        (FullAttentionFree, "mixes positions by a table"),
        (lambda: Recurrent(write=False), "from position to position"),
        (lambda: Recurrent(write=True), "from position to position"),
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


@pytest.mark.parametrize("mixer", [Gated, Experts])
def test_gates_and_experts_stay_mlps(mixer) -> None:
    check(
        Tokens(Block("pre", mixer), Block()),
        ["mlp", "mlp", "msa", "mlp"],
        {"blocks.0.*": "mlp", "blocks.1.mixer.*": "msa"},
    )


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
