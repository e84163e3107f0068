"""Instances, not only classes: blocks used twice, shared parameters, units without any, wrappers, another order."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import known_units, reading_branches, units, zeroed
from vitscope.runtime.errors import StructureError

C = 8


class Conv(nn.Module):
    """A residual convolution written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.kernel = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kernel(F.relu(self.norm(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(x)))


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pool(x)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 3)


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.down, self.up = layer, nn.Conv2d(C, 2, 1), nn.Conv2d(2, layer.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class MlpFirst(Block):
    """timm's block with its halves in another order."""

    def forward(self, x: Tensor, **_: object) -> Tensor:
        x = x + self.mlp(self.norm2(x))
        return x + self.attn(self.norm1(x))


def network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), *blocks, *head).double().eval()


def kinds_of(model: nn.Module) -> list[str]:
    return [unit.kind for unit in units(model)]


X = torch.rand(2, 3, 12, 10, dtype=torch.float64)


@torch.no_grad()
def test_a_block_that_runs_twice_is_two_units_which_are_removed_one_by_one() -> None:
    block = Conv()
    model = network(block, Mlp(), block)
    first, mlp, second = units(model)
    assert (first.name, mlp.name, second.name) == ("1.kernel", "2", "1.kernel:2")
    x = model[0](X)
    head = model[4:]
    without_first, without_second = head(block(model[2](x))), head(model[2](block(x)))
    with zeroed(first):
        assert torch.equal(model(X), without_first)
    with zeroed(second):
        assert torch.equal(model(X), without_second)
    taps = {tap.name: tap for tap in vs.taps(model)}
    assert (taps["1.kernel"].call, taps["1.kernel:2"].call) == (0, 1)


def test_a_parameter_shared_by_units_of_one_kind_has_it_and_of_two_kinds_is_refused() -> None:
    a, b = Conv(), Conv()
    b.kernel = a.kernel
    kinds = parameter_kinds(network(a, b))
    assert kinds["1.kernel.weight"] == "conv"
    conv, mlp = Conv(), Mlp()
    conv.norm = nn.BatchNorm2d(C)
    mlp.wide, mlp.narrow = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
    mlp.narrow.bias = conv.kernel.bias
    with pytest.raises(StructureError, match=r"parameter 1.kernel.bias is shared by units of kinds conv and mlp"):
        parameter_kinds(network(conv, mlp))


@pytest.mark.parametrize("block", [Pool, Shift])
def test_a_unit_without_parameters_is_pooling(block: type[nn.Module]) -> None:
    model = network(Conv(), block(), Mlp())
    assert [unit.kind for unit in known_units(model)] == ["conv", "pool", "mlp"]
    assert vs.structure(model).units[1].parameters == ()


@torch.no_grad()
def test_a_shift_that_no_module_returns_is_removed_where_it_is_added() -> None:
    model = network(Conv(), Shift(), Mlp())
    shift = vs.structure(model).units[1]
    assert (shift.kind, shift.branch) == ("pool", True)
    place = next(i for i, module in enumerate(model) if isinstance(module, Shift))
    without = nn.Sequential(*(module for i, module in enumerate(model) if i != place))
    x = torch.rand(2, 3, 12, 10).to(next(model.parameters()))
    with zeroed(units(model)[1]):
        output = model(x)
    assert torch.equal(output, without(x))


def test_a_subclass_with_another_order_of_its_halves() -> None:
    model = vs.models.vit(patch_size=8, depth=2)
    model.blocks[1] = MlpFirst(192, 3).eval()
    assert [unit.name for unit in units(model)] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp", "blocks.1.attn"]


def test_an_adapter_beside_a_layer_belongs_to_its_unit() -> None:
    conv, mlp = Conv(), Mlp()
    conv.kernel, mlp.wide = Adapted(conv.kernel), Adapted(mlp.wide)
    model = network(conv, mlp)
    assert kinds_of(model) == ["conv", "mlp"]
    kinds = parameter_kinds(model)
    assert kinds["1.kernel.up.weight"] == "conv"
    assert kinds["2.wide.down.weight"] == "mlp"


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), nn.Sequential])
def test_wrappers_are_looked_through(wrap) -> None:
    model = network(Conv(), Mlp())
    assert kinds_of(wrap(model)) == ["conv", "mlp"]
    assert list(parameter_kinds(wrap(model)).values()) == list(parameter_kinds(model).values())


def test_a_series_of_units_with_a_skip_around_it_is_no_unit() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Conv(), Mlp())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    assert [unit.name for unit in units(network(Around()))] == ["1.inner.0.kernel", "1.inner.1"]


def test_grids_come_from_the_pass_that_is_measured() -> None:
    model = vs.models.timm_model("pvt_v2_b0", num_classes=4, image_size=64).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    found = vs.taps(model, torch.rand(1, 3, 64, 96))
    with (
        torch.no_grad(),
        vs.models.structure.reading(model, found, lambda i, tap, x: shapes.update({tap.name: x.shape})),
    ):
        model(torch.rand(1, 3, 64, 96))
    assert shapes["stages.0.blocks.0.attn"][2:] == (16, 24)
    assert shapes["stages.3.blocks.1.mlp"][2:] == (2, 3)


class Mixer(nn.Module):
    """Attention that nothing but its products tells, and an MLP, in one block; ``way`` says how they are added."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.norm, self.out = nn.LayerNorm(C), nn.Linear(C, C)
        self.parts = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.wide, self.narrow = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.gamma = nn.Parameter(torch.full((C,), 0.3))

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in self.parts)
        return self.out(torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v))

    def first_sum(self, x: Tensor) -> Tensor:
        branch = self.mix(self.norm(x))
        if self.way == "alpha":
            return torch.add(x, branch, alpha=0.3)
        if self.way == "addcmul":
            return torch.addcmul(x, self.gamma, branch)
        if self.way == "lerp":
            return torch.lerp(x, branch, 0.3)
        if self.way == "gated":
            return 0.9 * x + self.gamma * branch
        return x + branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_sum(x)
        return y + self.narrow(F.gelu(self.wide(self.norm(x if self.way == "parallel" else y))))


class OneForward(nn.Module):
    """A network whose last sum is no module's output."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, C, 2, 2), Mixer(way), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for _ in range(2):
            x = Mixer.forward(self.block, x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("way", ["plain", "parallel", "alpha", "addcmul", "lerp", "gated"])
@torch.no_grad()
def test_sums_that_no_module_returns_are_read(way: str) -> None:
    torch.manual_seed(0)
    model = OneForward(way).double().eval()
    found = vs.taps(model, X)
    assert [tap.kind for tap in found] == ["stem", "msa", "mlp", "msa", "mlp"]
    read: dict[int, Tensor] = {}
    with vs.models.structure.reading(model, found, lambda i, tap, x: read.update({i: x.clone()})):
        for _ in range(2):  # the second pass reads the same sums
            read.clear()
            model(X)
    stream, block = model.embed(X).flatten(2).mT, model.block
    for i in (1, 3):
        expected = (block.first_sum(stream), Mixer.forward(block, stream))
        for k, value in enumerate(expected):
            assert torch.equal(read[i + k], value.mT.unflatten(2, (6, 5)))
        stream = expected[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("way", ["alpha", "addcmul", "lerp", "gated"])
@torch.no_grad()
def test_a_scaled_branch_is_read_only_as_an_operand(way: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, C, 2, 2), nn.Flatten(2), Transposed(), Mixer(way), nn.Flatten(), nn.Linear(240, 4)
    )
    model.double().eval()
    attention = known_units(model, X)[0]
    assert (attention.kind, attention.branch_out is not None) == ("msa", True)
    read: list[Tensor] = []
    refused = pytest.raises(StructureError, match="scaled or cut before it is added")
    with (
        nullcontext() if way == "gated" else refused,
        reading_branches(model, [attention], lambda i, unit, side, x: read.append(x)),
    ):
        model(X)
    tokens = model[:3](X)
    weight = 0.7 if way == "lerp" else 0.9 if way == "gated" else 1.0
    block = model[3]
    assert isinstance(block, Mixer)
    if way == "gated":
        added = block.first_sum(tokens) - 0.9 * tokens
        assert (read[-1].flatten(2).mT - added).abs().max() < 1e-12
    stream = weight * tokens
    without = stream + block.narrow(F.gelu(block.wide(block.norm(stream))))
    with zeroed(attention):
        assert (model(X) - model[4:](without)).abs().max() < 1e-12


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT
