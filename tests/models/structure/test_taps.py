from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitscope as vs
from tests.fixtures.configs.model_configs import from_config
from tests.fixtures.oracles.feature_maps import as_map, image, maps
from vitscope import models
from vitscope.core.tap import Tap
from vitscope.models.structure.attention_weights import AttentionCall, AttentionMode
from vitscope.models.structure.taps import reading, taps

VITS = {
    "cls": lambda: models.vit(patch_size=8, depth=3),
    "gap": lambda: models.vit(patch_size=8, depth=3, pool="gap"),
    "registers": lambda: models.vit(patch_size=8, depth=3, reg_tokens=4),
    "local": lambda: models.convit(patch_size=8, depth=3),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3),
    "layer scale": lambda: timm.create_model("deit3_small_patch16_224", img_size=64, depth=3),
}


@pytest.mark.parametrize("name", VITS)
def test_vit_taps_equal_an_explicit_forward_of_each_half(name: str) -> None:
    model = VITS[name]().double().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x = image(32, 32) if name in ("cls", "gap", "registers", "local") else image(64, 64)
    read = maps(model, x)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        assert torch.equal(read["stem"], as_map(tokens, prefix, 4, 4))
        for i, block in enumerate(model.blocks):
            tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
            assert (read[f"blocks.{i}.attn"] - as_map(tokens, prefix, 4, 4)).abs().max() < 1e-12
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            assert (read[f"blocks.{i}.mlp"] - as_map(tokens, prefix, 4, 4)).abs().max() < 1e-12
    assert len(read) == 7


@pytest.mark.parametrize("name", ["cls", "registers", "distilled", "layer scale"])
def test_prefix_tokens_of_vit_taps_equal_an_explicit_forward(name: str) -> None:
    model = VITS[name]().double().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x = image(64, 64) if name in ("distilled", "layer scale") else image(32, 32)
    read: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        reading(model, taps(model), lambda *_: None, lambda _, tap, value: read.update({tap.name: value.clone()})),
    ):
        model(x)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        assert torch.equal(read["stem"], tokens[:, :prefix])
        for i, block in enumerate(model.blocks):
            tokens = block(tokens)
            assert (read[f"blocks.{i}.mlp"] - tokens[:, :prefix]).abs().max() < 1e-12
    assert len(read) == 7


def test_swin_taps_equal_an_explicit_forward_of_each_half() -> None:
    model = from_config("swin")
    x = image(32, 32)
    read = maps(model, x)
    with torch.no_grad():
        z = model.patch_embed(x)  # (B, H, W, C)
        for s, stage in enumerate(model.layers):
            z = stage.downsample(z)
            if s > 0:
                assert (read[f"layers.{s}.downsample"] - z.permute(0, 3, 1, 2)).abs().max() < 1e-12
            for i, block in enumerate(stage.blocks):
                z = z + block._attn(block.norm1(z))
                assert (read[f"layers.{s}.blocks.{i}.attn"] - z.permute(0, 3, 1, 2)).abs().max() < 1e-12
                z = z + block.mlp(block.norm2(z))
                assert (read[f"layers.{s}.blocks.{i}.mlp"] - z.permute(0, 3, 1, 2)).abs().max() < 1e-12
    assert any(block.shift_size != (0, 0) for stage in model.layers for block in stage.blocks)


def test_pit_taps_equal_an_explicit_forward_of_each_half() -> None:
    model = from_config("pit", patch_size=8, image_size=(32, 64))
    x = image(32, 64)
    read = maps(model, x)
    with torch.no_grad():
        z = model.patch_embed(x) + model.pos_embed
        cls = model.cls_token.expand(2, -1, -1)
        assert torch.equal(read["stem"], z)
        for s, stage in enumerate(model.transformers):
            if s > 0:
                z, cls = stage.pool(z, cls)
                assert (read[f"transformers.{s}.pool"] - z).abs().max() < 1e-12
            h, w = z.shape[-2:]
            tokens = torch.cat((cls, z.flatten(2).transpose(1, 2)), 1)
            for i, block in enumerate(stage.blocks):
                tokens = tokens + block.attn(block.norm1(tokens))
                assert (read[f"transformers.{s}.blocks.{i}.attn"] - as_map(tokens, 1, h, w)).abs().max() < 1e-12
                tokens = tokens + block.mlp(block.norm2(tokens))
                assert (read[f"transformers.{s}.blocks.{i}.mlp"] - as_map(tokens, 1, h, w)).abs().max() < 1e-12
            cls, z = tokens[:, :1], as_map(tokens, 1, h, w)


def test_mixer_taps_equal_an_explicit_forward_of_each_half() -> None:
    model = from_config("mixer", patch_size=8)
    x = image(32, 32)
    read = maps(model, x)
    with torch.no_grad():
        z = model.stem(x)
        for i, block in enumerate(model.blocks):
            z = z + block.mlp_tokens(block.norm1(z).transpose(1, 2)).transpose(1, 2)
            assert (read[f"blocks.{i}.mlp_tokens"] - as_map(z, 0, 4, 4)).abs().max() < 1e-12
            z = z + block.mlp_channels(block.norm2(z))
            assert (read[f"blocks.{i}.mlp_channels"] - as_map(z, 0, 4, 4)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["convnet", "preresnet", "alternet"])
def test_convolutional_taps_are_the_stem_and_the_blocks(name: str) -> None:
    model = from_config(name)
    x = image(32, 32)
    read = maps(model, x)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4] if name == "convnet" else model.stages
    with torch.no_grad():
        z = model.act1(model.bn1(model.conv1(x))) if name == "convnet" else model.stem(x)
        expected = [z]
        for stage in stages:
            for block in getattr(stage, "blocks", stage):
                z = block(z)
                expected.append(z.clone())
    assert all(torch.equal(a, b) for a, b in zip(read.values(), expected, strict=True))


def test_positions_of_the_papers_figures() -> None:
    r50 = taps(models.convnet(50, stem="imagenet"))
    assert [i for i, tap in enumerate(r50) if tap.subsamples] == [4, 8, 14]
    vit = taps(models.vit())
    assert [i for i, tap in enumerate(vit) if tap.kind == "msa"] == list(range(1, 24, 2))
    assert len(vit) == 25
    alter = taps(models.alternet(50, n_msa=(0, 1, 1, 2)))
    assert [t.name for t in alter if t.kind == "msa"] == ["stages.1.3", "stages.2.5", "stages.3.1", "stages.3.3"]
    assert [t.kind for t in taps(models.alternet(mixer="blur"))].count("pool") == 3


def test_the_imagenet_stem_is_read_after_its_pooling() -> None:
    for model in (
        models.convnet(stem="imagenet"),
        models.preresnet(stem="imagenet"),
        models.alternet(stem="imagenet", image_size=64, window_size=2),
    ):
        assert maps(model.double().eval(), image(64, 64))["stem"].shape == (2, 64, 16, 16)


@pytest.mark.parametrize(
    ("name", "n", "last"),
    [
        ("resnet18", 9, (512, 2, 2)),
        ("convnext_tiny", 22, (768, 2, 2)),
        ("swin_t", 28, (768, 2, 2)),
        ("vit_b_32", 25, (768, 2, 2)),
    ],
)
def test_torchvision_models_are_known_by_their_blocks(name: str, n: int, last: tuple) -> None:
    options = {"image_size": 64} if name == "vit_b_32" else {}
    model = getattr(torchvision.models, name)(**options).eval()
    read = maps(model, torch.rand(1, 3, 64, 64))
    assert len(read) == n
    assert next(reversed(read.values())).shape[1:] == last


class HandWritten(nn.Module):
    """A ResNet block as many repositories write it."""

    def __init__(self, cin: int, cout: int, stride: int, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        if pre:
            self.bn1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, cout, 3, stride, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(cout), nn.Conv2d(cout, cout, 3, 1, 1)
        else:
            self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout)
            self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1), nn.BatchNorm2d(cout)
        self.shortcut = nn.Conv2d(cin, cout, 1, stride) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            branch = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
            return branch + self.shortcut(x)
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


@pytest.mark.parametrize("pre", [True, False])
def test_hand_written_residual_blocks_are_known_by_their_children(pre: bool) -> None:
    blocks = nn.Sequential(HandWritten(4, 4, 1, pre), HandWritten(4, 8, 2, pre))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), blocks, nn.Flatten()).double().eval()
    found = taps(model)
    assert [(t.name, t.kind, t.subsamples) for t in found] == [
        ("stem", "stem", False),
        ("2.0", "conv", False),
        ("2.1", "conv", True),
    ]
    x = image(8, 8)
    read = maps(model, x)
    assert torch.equal(read["2.0"], blocks[0](model[:2](x)))


def test_a_model_inside_another_is_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = models.vit(patch_size=8, depth=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x).softmax(-1)

    model = Wrapper().double().eval()
    read = maps(model, image(32, 32))
    assert list(read) == ["stem", "backbone.blocks.0.attn", "backbone.blocks.0.mlp"]
    assert read["backbone.blocks.0.attn"].shape == (2, 192, 4, 4)


def test_gates_of_an_unknown_convnet_are_not_read() -> None:
    model = timm.create_model("lcnet_035", num_classes=3).eval()
    assert any(".se." in name for name, _ in model.named_modules())
    read = maps(model, torch.rand(1, 3, 64, 64))
    assert not any(".se." in name for name in read)
    assert read["blocks.0.0.conv_dw"].shape == (1, 8, 32, 32)


def test_maps_that_are_not_one_an_image_are_refused() -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=3).eval()  # its blocks see 4 sets of pixels an image
    x = torch.rand(2, 3, 64, 64)
    block = model.stages[2][1].transformer[0]
    with pytest.raises(ValueError, match=r"tap 'pixels' reads 8 maps of 2 images; pass taps=\[...\] without it"):
        maps(model, x, [Tap("pixels", "msa", 1, 0.0, block, layout="NLC")])
    assert maps(model, x, taps(model, x))["stages.2.1.transformer.0.mlp"].shape == (2, 64, 8, 8)  # put in order


def test_an_unknown_convnet_is_read_at_its_convolutions_and_pooling() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.Flatten()
    ).double()
    found = taps(model)
    assert [(t.name, t.kind, t.stage, t.depth) for t in found] == [
        ("0", "conv", 1, 0.0),
        ("2", "pool", 2, 0.5),
        ("3", "conv", 2, 1.0),
    ]
    assert [tuple(v.shape) for v in maps(model, image(8, 8)).values()] == [(2, 4, 8, 8), (2, 4, 4, 4), (2, 6, 4, 4)]


def test_a_model_without_anything_known_says_how_to_pass_taps() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r'its forward pass fails: .* taps=\[vitscope\.Tap\("block1"') as error:
        vs.taps(model)
    assert "\n" not in str(error.value)


def test_a_transformer_of_unknown_blocks_is_refused_rather_than_read_at_its_patches() -> None:
    layers = (
        nn.Conv2d(3, 8, 4, 4),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 2, 16),
        nn.Flatten(),
        nn.Linear(512, 2),
    )
    described = (
        r"Sequential has no block that vitscope knows: describe .* Probe\(.*, structure=.*, taps=\[vitscope.Tap\("
    )
    with pytest.raises(ValueError, match=described):
        taps(nn.Sequential(*layers[:2], *layers[3:]))
    assert len(taps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))) == 1


def test_taps_of_ones_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Conv1d(4, 5, 1)).double()
    own = [
        vs.Tap("pixels", "stem", stage=0, depth=0.0, module=model[0], at="input"),
        vs.Tap("tokens", "mlp", stage=1, depth=1.0, module=model[2], layout="NCL"),
    ]
    x = image(4, 6)
    read = maps(model, x, own)
    assert torch.equal(read["pixels"], x)
    assert torch.equal(read["tokens"], model(x).reshape(2, 5, 4, 6))


def test_a_tensor_that_is_no_map_is_an_error_with_the_taps_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"tap 'logits' reads a tensor of shape \(2, 3\), not a NCHW map"):
        maps(model, torch.zeros(2, 3, 2, 2), [Tap("logits", "head", 1, 0.0, model[1])])


def test_hooks_are_gone_after_reading_and_after_an_error() -> None:
    model = models.vit(patch_size=16, depth=1)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), reading(model, taps(model), fail):
        model(torch.zeros(1, 3, 32, 32))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tap_is_shown_in_one_line() -> None:
    tap = Tap("blocks.0", "msa", 1, 0.5, nn.Sequential(nn.Linear(2, 2), nn.ReLU()), layout="NLC")
    assert repr(tap) == "Tap(name='blocks.0', kind='msa', stage=1, depth=0.5, module=Sequential, layout='NLC')"


def test_attention_that_is_computed_from_a_map_is_not_noticed_and_other_modes_see_it() -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    network = timm.create_model("test_vit", num_classes=2).eval()
    noticed: list[AttentionCall] = []
    n_maps = 0

    def attend(index: int, tap: Tap, x: Tensor) -> None:
        nonlocal n_maps
        n_maps += 1
        tokens = x.flatten(2).transpose(1, 2)
        torch.erf(F.scaled_dot_product_attention(tokens, tokens, tokens))

    places = taps(network)  # a pass of its own
    with Names() as seen, AttentionMode(noticed.append), reading(network, places, attend):
        network(torch.randn(1, 3, 160, 160))
    assert len(noticed) == len(network.blocks)  # the network's own
    assert n_maps > 2
    assert {"layer_norm", "erf"} <= seen.names
