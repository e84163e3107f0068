"""Kinds of branches in constructed networks: attention, mixtures of experts, two branches in one sum, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure import reading
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import units, zeroed
from vitscope.runtime.errors import StructureError

C, GRID = 8, (4, 3)
N = GRID[0] * GRID[1]
X = torch.rand(2, 3, 8, 6, dtype=torch.float64)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Mixer(nn.Module):
    """Queries, keys and values that a function combines."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.attend(self.q(x), self.k(x), self.v(x)))


class Network(nn.Module):
    """A mixer and an MLP on tokens, all in one forward; ``without`` leaves branches out."""

    def __init__(self, mixer: nn.Module, way: str = "series") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.way = nn.Conv2d(3, C, 2, 2), nn.Linear(C, 4), way
        self.norm1, self.norm2, self.mixer, self.mlp = nn.LayerNorm(C), nn.LayerNorm(C), mixer, Mlp()
        self.without: set[str] = set()
        self.streams: list[Tensor] = []
        self.double().eval()

    def branch(self, name: str, x: Tensor) -> Tensor:
        value = getattr(self, name)(x)
        return torch.zeros_like(value) if name in self.without else value

    def body(self, x: Tensor) -> Tensor:
        if self.way == "series":
            x = x + self.branch("mixer", self.norm1(x))
            self.streams.append(x.clone())
            x = x + self.branch("mlp", self.norm2(x))
        elif self.way == "differences":
            x = x - self.branch("mixer", self.norm1(x))
            self.streams.append(x.clone())
            x = torch.sub(x, self.branch("mlp", self.norm2(x)))
        elif self.way == "parallel":
            y = self.norm1(x)
            x = x + (self.branch("mixer", y) + self.branch("mlp", y))
            self.streams.append(x.clone())
        elif self.way == "one branch":
            y = self.norm1(x)
            x = x + torch.stack((self.branch("mixer", y), self.branch("mlp", y))).sum(0)
        elif self.way == "reversible":
            a = x + self.branch("mixer", self.norm1(x))
            self.streams.append(a.clone())
            b = x + self.branch("mlp", self.norm2(a))
            self.streams.append(b.clone())
            return (a + b) / 2
        self.streams.append(x.clone())
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.streams = []
        return self.head(self.body(self.embed(x).flatten(2).mT).mean(1))


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def by_products_of_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([torch.mm(softmax(torch.mm(a, b.t())), c) for a, b, c in zip(q, k, v)])


def by_tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = [softmax(torch.tensordot(a, b, dims=([1], [1]))) for a, b in zip(q, k)]
    return torch.stack([torch.tensordot(a, b, dims=1) for a, b in zip(weights, v)])


def by_causal_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sums = (k.exp().unsqueeze(3) * v.unsqueeze(2)).cumsum(1)  # (B, N, C, C)
    return (q.exp().unsqueeze(2) @ sums).squeeze(2)


def by_shifts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    neighbors = torch.stack([v.roll(shift, 1) for shift in (-1, 0, 1)], 2)  # (B, N, 3, C)
    return (softmax(q[..., :3]).unsqueeze(3) * neighbors).sum(2) + 0 * k


@pytest.mark.parametrize("attend", [by_products_of_matrices, by_tensordot, by_causal_sums, by_shifts])
def test_attention_is_known_by_what_it_multiplies(attend: Attend) -> None:
    assert [unit.kind for unit in units(Network(Mixer(attend)), X)] == ["msa", "mlp"]


class Experts(nn.Module):
    """A softmax that weighs the outputs of three MLPs at each position."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.router, self.way = nn.Linear(C, 3), way
        self.experts = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = softmax(self.router(x))
        outputs = torch.stack([expert(x) for expert in self.experts], 2)  # (B, N, 3, C)
        if self.way == "einsum":
            return torch.einsum("bne,bned->bnd", weights, outputs)
        if self.way == "matmul":
            return (weights.unsqueeze(2) @ outputs).squeeze(2)
        return (weights.unsqueeze(3) * outputs).sum(2)


@pytest.mark.parametrize("way", ["einsum", "matmul", "sum"])
def test_a_mixture_of_experts_is_an_mlp(way: str) -> None:
    model = Network(Experts(way))
    assert [unit.kind for unit in units(model, X)] == ["mlp", "mlp"]
    assert {kind for name, kind in parameter_kinds(model, X).items() if name.startswith("mixer")} == {"mlp"}


class Unfolded(nn.Module):
    """A convolution written as a product with patches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, 9 * C) / C)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x.mT.unflatten(2, GRID), 3, padding=1)  # (B, 9 C, N)
        return F.relu(self.weight @ patches).mT


class DynamicLayer(nn.Module):
    """A linear layer whose weight is a mixture that the image chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.weights = nn.Linear(C, 3), nn.Parameter(torch.randn(3, C, C) / C)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("be,eoc->boc", softmax(self.router(x.mean(1))), self.weights)
        return F.relu(torch.einsum("bnc,boc->bno", x, weight))


@pytest.mark.parametrize(("mixer", "kind"), [(Unfolded, "conv"), (DynamicLayer, "mlp")])
def test_a_product_that_is_no_attention(mixer: Callable[[], nn.Module], kind: str) -> None:
    assert [unit.kind for unit in units(Network(mixer()), X)] == [kind, "mlp"]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q @ k.mT) @ v


torch.library.define("vitscope_tests::attend", "(Tensor q, Tensor k, Tensor v) -> Tensor")
torch.library.impl("vitscope_tests::attend", "CompositeImplicitAutograd")(_attend)


def by_an_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.vitscope_tests.attend(q, k, v)


def by_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(_attend)(q, k, v)


def by_unnormalized_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)).sum(-1) @ v


def by_a_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(q[:, 0]).unsqueeze(2), []
    for i in range(N):
        state = 0.9 * state + v[:, i].unsqueeze(2) * k[:, i, :4].unsqueeze(1)  # (B, C, 4)
        outputs.append((state * q[:, i, :4].unsqueeze(1)).sum(2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (by_an_operator, "runs a function that the forward pass does not show"),
        (by_vmap, "runs a function that the forward pass does not show"),
        (by_unnormalized_sums, "multiplies activations by activations"),
        (by_a_state, "sums products of activations over an axis that is not known"),
    ],
)
def test_a_branch_whose_kind_is_not_certain_is_refused_by_name(attend: Attend, reason: str) -> None:
    model = Network(Mixer(attend))
    for find in (units, parameter_kinds):
        with pytest.raises(StructureError, match=f"Network: the kind of mixer is not certain: it {reason}.*structure="):
            find(model, X)
    assert not vs.structure(model, X).is_complete
    with pytest.warns(UserWarning, match="taps of Network: the kind of mixer is not certain"):
        vs.taps(model, X)


@pytest.mark.parametrize("way", ["series", "differences", "parallel", "reversible"])
@torch.no_grad()
def test_attention_and_mlp_are_units_of_their_own_however_they_are_added(way: str) -> None:
    model = Network(Mixer(_attend), way)
    if way == "parallel":
        del model.norm2
    found = units(model, X)
    assert [(unit.name, unit.kind) for unit in found] == [("mixer", "msa"), ("mlp", "mlp")]
    kinds = parameter_kinds(model, X)
    assert {kinds[f"mixer.{key}"] for key, _ in model.mixer.named_parameters()} == {"msa"}
    assert {kinds[f"mlp.{key}"] for key, _ in model.mlp.named_parameters()} == {"mlp"}
    for unit in found:
        with zeroed(unit):
            lesion = model(X)
        model.without = {unit.name}
        assert (lesion - model(X)).abs().max() < 1e-12
        model.without = set()
    taps, maps = vs.taps(model, X), list[Tensor]()
    with reading(model, taps, lambda _i, _tap, x: maps.append(x.clone())):
        model(X)
    assert [tap.kind for tap in taps] == ["stem", "msa", "mlp"]
    for read, stream in zip(maps[1:], model.streams, strict=True):
        assert torch.equal(read, stream.mT.unflatten(2, GRID))


def test_one_branch_of_attention_and_an_mlp_is_told() -> None:
    model = Network(Mixer(_attend), "one branch")
    del model.norm2
    with pytest.warns(
        UserWarning, match="one branch holds attention and an MLP, whose parameters have kind msa: mixer"
    ):
        structure = vs.structure(model, X)
    assert [unit.with_mlp for unit in structure.units] == [True]
    assert "holds an MLP too" in str(structure)


def test_a_wrapper_leaves_the_head_of_a_network_in_one_forward_the_head() -> None:
    model = Network(Mixer(_attend))
    inner, outer = parameter_kinds(model, X), parameter_kinds(nn.Sequential(model), X)
    assert outer == {f"0.{name}": kind for name, kind in inner.items()}
    assert inner["head.weight"] == "head"


class Latents(nn.Module):
    """Latent vectors that read the map of a stem by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.latents, self.head = nn.Conv2d(3, C, 2, 2), nn.Parameter(torch.randn(1, 5, C)), nn.Linear(C, 4)
        self.q, self.k, self.v, self.mlp = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        y = self.latents.expand(len(x), -1, -1)
        y = y + _attend(self.q(y), self.k(x), self.v(x))
        return self.head((y + self.mlp(y)).mean(1))


def test_the_map_that_latent_vectors_read_comes_from_the_stem() -> None:
    kinds = parameter_kinds(Latents().double().eval(), X)
    assert (kinds["embed.weight"], kinds["k.weight"], kinds["mlp.wide.weight"]) == ("stem", "msa", "mlp")


class Reparameterized(nn.Module):
    """A depthwise layer without a shortcut before a residual MLP, as in RepViT."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 3, 1, 1, groups=C)
        self.wide, self.narrow = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        return x + self.narrow(F.gelu(self.wide(x)))


def test_a_layer_in_the_first_block_is_no_stem() -> None:
    blocks = (Reparameterized(), Reparameterized())
    model = nn.Sequential(
        nn.Conv2d(3, C, 2, 2), nn.Conv2d(C, C, 3, 1, 1, groups=C), *blocks, nn.Flatten(), nn.Linear(C * N, 4)
    )
    kinds = parameter_kinds(model.double().eval(), X)
    assert [kinds[f"{i}.depthwise.weight"] for i in (2, 3)] == ["conv", "conv"]
    assert [kinds[f"{i}.weight"] for i in (0, 1)] == ["stem", "stem"]
