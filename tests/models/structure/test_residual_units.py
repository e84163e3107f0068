from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.configs.model_configs import from_config
from vitscope import models
from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages
from vitscope.models.structure.residual_units import (
    Unit,
    conv3x3_identity,
    head_zeroed,
    reading_branches,
    units,
    zeroed,
)
from vitscope.models.structure.taps import taps


def by_name(model: nn.Module) -> dict[str, Unit]:
    return {unit.name: unit for unit in units(model)}


def image(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, dtype=torch.float64)


def branches(model: nn.Module, x: Tensor) -> dict[tuple[str, str], Tensor]:
    read: dict[tuple[str, str], Tensor] = {}

    def keep(_: int, unit: Unit, side: str, value: Tensor) -> None:
        read[unit.name, side] = value.clone()

    with torch.no_grad(), reading_branches(model, units(model), keep):
        model(x)
    return read


def test_branches_of_a_vit() -> None:
    model = models.vit(patch_size=8, depth=2, drop_path=0.1).double().eval()
    read = branches(model, x := image())
    with torch.no_grad():
        block, tokens = model.blocks[0], model._pos_embed(model.patch_embed(x))
        normalized = block.norm1(tokens)
        out = block.attn(normalized)
    assert torch.equal(read["blocks.0.attn", "input"].flatten(2).mT, normalized[:, 1:])
    assert (read["blocks.0.attn", "output"].flatten(2).mT - out[:, 1:]).abs().max() < 1e-12


def test_branch_of_a_pre_activation_block_starts_before_the_activation() -> None:
    model = from_config("preresnet")
    read = branches(model, x := image())
    with torch.no_grad():
        norm, z = model.stages[0].blocks[0].norm1, model.stem(x)
        expected = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    assert (read["stages.0.blocks.0", "input"] - expected).abs().max() < 1e-12
    assert read["stages.0.blocks.0", "input"].min() < 0


def test_branch_of_a_post_activation_block_is_its_last_norm() -> None:
    model = from_config("convnet", depth=50)
    read = branches(model, x := image())
    block = model.layer1[1]
    with torch.no_grad():
        z = model.layer1[0](model.act1(model.bn1(model.conv1(x))))
        assert torch.equal(read["layer1.1", "input"], z)
        branch = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(z))))))))
    assert (read["layer1.1", "output"] - branch).abs().max() < 1e-12


def test_a_removed_strided_block_is_its_projected_shortcut() -> None:
    model = from_config("convnet")
    block = model.layer2[0]
    z = torch.rand(1, 64, 8, 8, dtype=torch.float64)
    with torch.no_grad(), zeroed(by_name(model)["layer2.0"]):
        assert torch.equal(block(z), block.downsample(z).relu())


@pytest.mark.slow
def test_drop_path_squeeze_excitation_and_layer_scale_end_the_branch() -> None:
    for model in (
        models.convnet(drop_path=0.2).double().eval(),
        timm.create_model("legacy_seresnet18", num_classes=2).double().eval(),
        timm.create_model("deit3_small_patch16_224", img_size=32, depth=2).double().eval(),
    ):
        found = units(model)
        read: list[Tensor] = []

        def keep(_: int, unit: Unit, side: str, value: Tensor, read: list[Tensor] = read) -> None:
            if side == "output":
                read.append(value.clone())

        with torch.no_grad(), zeroed(*found), reading_branches(model, found, keep):
            model(image())
        assert len(read) == len(found)
        assert all(v.abs().max() == 0 for v in read)  # the reading hook comes after the removal


@pytest.mark.parametrize(("depth", "conv"), [(50, "conv2"), (18, "conv2")])
def test_conv3x3_identity(depth: int, conv: str) -> None:
    model = from_config("convnet", depth=depth)
    z = torch.rand(1, 256 if depth == 50 else 64, 9, 9, dtype=torch.float64)
    block = model.layer2[0]
    with torch.no_grad():
        if depth == 50:
            middle = block.act1(block.bn1(block.conv1(z)))[:, :, ::2, ::2]
            branch = block.bn3(block.conv3(block.act2(block.bn2(middle))))
        else:
            branch = block.bn2(block.act1(block.bn1(block.conv1(z))))
        expected = (branch + block.downsample(z)).relu()
        with conv3x3_identity(by_name(model)["layer2.0"]):
            assert torch.equal(block(z), expected)
        assert not torch.equal(block(z), expected)


def test_units_without_a_3x3_convolution_or_heads_are_refused() -> None:
    unit = units(models.vit(patch_size=8, depth=1))[1]
    with pytest.raises(ValueError, match=r"'blocks.0.mlp' has no 3x3"), conv3x3_identity(unit):
        pytest.fail("entered")
    with pytest.raises(ValueError, match=r"'blocks.0.mlp' has 0 heads, there is no head 0"), head_zeroed(unit, 0):
        pytest.fail("entered")


@pytest.mark.parametrize("name", ["vit", "alternet", "swin", "convit", "pit"])
def test_removing_every_head_leaves_the_output_bias(name: str) -> None:
    model = from_config(name)
    unit = next(u for u in units(model) if u.kind == "msa")
    read: list[Tensor] = []
    with torch.no_grad():
        assert unit.attention is not None
        hook = unit.attention.register_forward_hook(lambda m, a, output: read.append(output.clone()))
        model(x := image())
        full, pieces = read.pop(), []
        for head in range(unit.n_heads):
            with head_zeroed(unit, head):
                model(x)
            pieces.append(full - read.pop())
        hook.remove()
    bias = unit.attention.proj.bias
    assert unit.n_heads > 1
    assert (full - sum(pieces) - bias).abs().max() < 1e-12
    assert all(p.abs().max() > 1e-8 for p in pieces)


class BlocksInAnotherOrder(nn.Module):
    """A ViT's blocks that are called in a given order, whatever the order of their registration."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.order = list(order)
        self.patch_embed = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.ModuleList(Block(12, 3) for _ in order)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            called = [{key: value.clone() for key, value in block.state_dict().items()} for block in self.blocks]
            for number, weights in zip(order, called):
                self.blocks.get_submodule(str(number)).load_state_dict(weights)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        for number in self.order:
            tokens = self.blocks[number](tokens)
        return self.head(tokens.mean(dim=1))


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)])
def test_units_and_taps_are_in_the_order_of_calls(order: tuple[int, ...]) -> None:
    """Numbers by depth are those of the same function with its blocks registered in the order of calls."""
    model, registered = BlocksInAnotherOrder(order), BlocksInAnotherOrder((0, 1, 2))
    x, y = image(), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(model(x), registered(x))
    names = [f"blocks.{number}.{part}" for number in order for part in ("attn", "mlp")]
    assert [unit.name for unit in units(model, x)] == names
    assert [tap.name for tap in taps(model, x)] == ["stem", *names]
    probes = [vs.Probe(each, [(x, y)]) for each in (model, registered)]
    for measure in (vs.feature_map_variance, vs.lesion):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scalars, expected = (measure(probe).scalars() for probe in probes)
        assert scalars == pytest.approx(expected, rel=1e-12, nan_ok=True)


def coatnet() -> nn.Module:
    """Return a small CoAtNet, whose attention has its channels on the second axis and a convolution as output projection."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    transformer = MaxxVitTransformerCfg(dim_head=8)
    sizes = MaxxVitCfg(
        embed_dim=(8, 24), depths=(1, 1), block_type=("C", "T"), stem_width=8, transformer_cfg=transformer
    )
    return MaxxVit(sizes, img_size=32, num_classes=5).double().eval()


@pytest.mark.parametrize("make", [coatnet, lambda: models.vit(patch_size=8, depth=1, num_classes=5).double().eval()])
def test_without_a_head_the_projection_has_no_weights_for_its_channels(make: Callable[[], nn.Module]) -> None:
    model = make()
    unit = next(u for u in units(model, image()) if u.kind == "msa")
    assert unit.n_heads == 3
    assert unit.projection is not None
    weight = cast(Tensor, unit.projection.weight)
    kept, width = weight.clone(), weight.shape[1] // unit.n_heads
    with torch.no_grad():
        clean = model(x := image())
        for head in range(unit.n_heads):
            with head_zeroed(unit, head):
                measured = model(x)
            weight[:, head * width : (head + 1) * width] = 0
            torch.testing.assert_close(measured, model(x), rtol=0, atol=1e-13)
            weight.copy_(kept)
            assert (measured - clean).abs().max() > 1e-6


def test_a_model_without_residual_units_is_an_error() -> None:
    with pytest.raises(ValueError, match="Sequential has no residual unit that vitscope knows"):
        units(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_kinds_and_stages_of_parameters() -> None:
    kinds = parameter_kinds(models.vit(patch_size=8, depth=1))
    assert [n for n, k in kinds.items() if k == "stem"] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    assert [n for n, k in kinds.items() if k == "head"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert kinds["blocks.0.norm1.weight"] == kinds["blocks.0.attn.qkv.weight"] == "msa"
    assert kinds["blocks.0.norm2.weight"] == kinds["blocks.0.mlp.fc1.weight"] == "mlp"
    convnext = models.convnext()
    assert parameter_kinds(convnext)["stages.1.downsample.1.weight"] == "pool"
    assert parameter_stages(convnext)["stages.1.downsample.1.weight"] == 2
    alternet = models.alternet()
    assert parameter_kinds(alternet)["stages.1.1.attn.qkv.weight"] == "msa"
    assert parameter_kinds(alternet)["stages.1.0.downsample.conv.weight"] == "conv"
    assert parameter_stages(alternet)["fc.weight"] == 5


def test_kinds_of_a_plain_convnet() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    images = torch.zeros(2, 3, 5, 5)  # the size that leaves the head four features
    assert list(parameter_kinds(model, images).values()) == ["conv"] * 6 + ["head"] * 2


class ParallelBlock(Block):
    """Attention and MLP side by side."""

    def forward(self, x: Tensor, **_: object) -> Tensor:
        y = self.norm1(x)
        return x + self.attn(y) + self.mlp(y)


def test_a_block_that_runs_otherwise_than_its_type_is_read_as_it_runs() -> None:
    model = models.vit(patch_size=8, depth=2).double().eval()
    model.blocks[1] = ParallelBlock(192, 3).double().eval()
    attention, mlp = units(model)[2:]
    assert [(unit.kind, unit.name) for unit in (attention, mlp)] == [("msa", "blocks.1.attn"), ("mlp", "blocks.1.mlp")]
    read = branches(model, x := image())
    block = model.blocks[1]
    with torch.no_grad():
        tokens = model.blocks[0](model._pos_embed(model.patch_embed(x)))
        normed = block.norm1(tokens)
        assert torch.equal(read["blocks.1.mlp", "output"].flatten(2).mT, block.mlp(normed)[:, 1:])
        with zeroed(attention):
            assert torch.equal(block(tokens), tokens + block.mlp(normed))
    with pytest.warns(UserWarning, match=r"does not use have their unit's kind: blocks.1.norm2.weight"):
        kinds = parameter_kinds(model)
    assert kinds["blocks.1.attn.qkv.weight"] == "msa"
    assert kinds["blocks.1.mlp.fc1.weight"] == "mlp"
    other = models.vit(patch_size=8, depth=1)
    other.blocks[0].forward = torch.compile(other.blocks[0].forward, backend="eager")
    assert len(units(other)) == 2
    other.blocks[0].forward = lambda x: x
    with pytest.raises(ValueError, match="Block with a forward of its own"):
        units(other)


class Gated(nn.Module):
    """A hand-written residual block with squeeze and excitation at its end."""

    def __init__(self, width: int, gate: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.gate, self.shortcut = gate, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))) + self.shortcut(x)


def test_the_branch_of_a_hand_written_block_ends_after_its_gate() -> None:
    gate = torchvision.ops.SqueezeExcitation(4, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Gated(4, gate), nn.Flatten()).double().eval()
    (unit,) = units(model)
    assert unit.branch_out.module is gate
    x = image(6)
    with torch.no_grad(), zeroed(unit):
        assert torch.equal(model(x), model[0](x).flatten(1))
    convolution = nn.Conv2d(4, 4, 1).double()
    (unit,) = units(nn.Sequential(nn.Conv2d(3, 4, 1).double(), Gated(4, convolution).double().eval(), nn.Flatten()))
    assert unit.branch_out.module is convolution
    (legacy,) = {type(u.branch_out.module).__name__ for u in units(timm.create_model("legacy_seresnet18"))}
    assert legacy == "SEModule"
