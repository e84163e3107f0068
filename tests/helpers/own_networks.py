"""Networks as users write them, whose branches can be set to zero in their own code, and the comparison with the units found."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.residual_units import units, zeroed

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
