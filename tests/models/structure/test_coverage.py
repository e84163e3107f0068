from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vitscope as vs
from vitscope import models
from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages
from vitscope.models.structure.residual_units import known_units, units, zeroed
from vitscope.models.structure.taps import missing_units, taps
from vitscope.runtime.errors import StructureError


class ExplicitMixing(nn.Module):
    """Attention whose class name does not say so: softmax, then a product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class LinearMixing(ExplicitMixing):
    """Linear attention: products without a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).relu().chunk(3, -1)
        return self.out(torch.einsum("bnc,bcd->bnd", q, torch.einsum("bnc,bnd->bcd", k, v)))


class FusedMixing(ExplicitMixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class TorchMixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class TokenMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Hybrid(nn.Module):
    """A residual convolution, whose block is described, and a residual mixing of tokens, whose block is not."""

    def __init__(self, mixing: nn.Module | None, first: bool = False) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, stride=2, padding=1), BasicBlock(8, 8)
        self.mixing, self.first, self.head = mixing, first, nn.Linear(8, 4)

    def mixed(self, x: Tensor) -> Tensor:
        if self.mixing is None:
            return x
        return x + self.mixing(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(self.mixed(x)) if self.first else self.mixed(self.block(x))
        return self.head(x.mean((2, 3)))


class Plain(Hybrid):
    """The same without a residual addition around the mixing."""

    def mixed(self, x: Tensor) -> Tensor:
        return self.mixing(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def probe(model: nn.Module, side: int = 8) -> vs.Probe:
    return vs.Probe(model.eval(), [(torch.rand(4, 3, side, side), torch.tensor([0, 1, 2, 3]))])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mixing", [ExplicitMixing, LinearMixing, FusedMixing, TorchMixing])
def test_attention_outside_of_known_units_is_refused_by_name(mixing: type[nn.Module], first: bool) -> None:
    model = Plain(mixing(8), first)
    for find in (units, parameter_kinds, parameter_stages):
        with pytest.raises(
            StructureError, match=r"^Plain: attention module mixing.* is not part of a known unit; pass structure="
        ):
            find(model)
    with pytest.warns(UserWarning, match="no map is read after attention module mixing"):
        assert len(taps(model)) == 2
    assert [unit.name for unit in known_units(model)] == ["block"]
    assert not vs.structure(model).is_complete


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mixing", [ExplicitMixing, LinearMixing, FusedMixing, TorchMixing, TokenMlp])
def test_residual_mixing_of_an_unknown_block_is_a_unit(mixing: type[nn.Module], first: bool) -> None:
    model = Hybrid(mixing(8), first).double().eval()
    kind = "mlp" if mixing is TokenMlp else "msa"
    kinds = parameter_kinds(model)
    assert {kinds[name] for name in kinds if name.startswith("mixing")} == {kind}
    assert {name.split(".")[0] for name in kinds if kinds[name] in ("stem", "head")} == {"stem", "head"}
    found = units(model)
    assert [unit.kind for unit in found] == ([kind, "conv"] if first else ["conv", kind])
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad(), zeroed(next(unit for unit in found if unit.kind == kind)):
        removed = model(x)
    assert torch.equal(removed, Hybrid.forward(_without(model), x))


def _without(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.mixing = None
    return copied


@pytest.mark.parametrize(
    "measure",
    [
        vs.lesion, vs.branch_transfer, vs.hessian_by_kind, vs.relative_log_amplitude, vs.feature_map_variance,
        vs.attention_distance,
    ],
)  # fmt: skip
def test_measures_that_compare_kinds_refuse_attention_outside_of_units(measure) -> None:
    with pytest.raises(StructureError, match="Plain: attention module mixing is not part of a known unit"):
        measure(probe(Plain(ExplicitMixing(8))))


def test_measures_of_maps_alone_go_on_with_one_notice() -> None:
    for measure in (vs.effective_rank, vs.cka):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = measure(probe(Plain(ExplicitMixing(8))))
        assert result.taps == ("stem", "block")
        assert sum("no map is read after" in str(w.message) for w in told) == 1


def test_taps_by_hand_are_trusted() -> None:
    model = Hybrid(ExplicitMixing(8))
    batches = [(torch.rand(128, 3, 8, 8), torch.arange(128) % 4)]  # enough images for intervals
    tap = vs.Tap("block", "conv", 1, 0.0, model.block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vs.feature_map_variance(vs.Probe(model.eval(), batches, taps=[tap])).taps == ("block",)


def test_an_mlp_on_tokens_outside_of_known_units_is_refused() -> None:
    for first in (False, True):
        with pytest.raises(
            StructureError, match=r"Plain: (MLP|linear layer on tokens after the last unit) mixing.* is not part of"
        ):
            units(Plain(TokenMlp(8), first))


def test_one_product_of_activations_is_no_attention() -> None:
    class Gram(Hybrid):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.stem(x)).flatten(2)
            return self.head((x @ x.mT).mean(2))

    assert [unit.name for unit in units(Gram(None))] == ["block"]


def test_networks_that_do_not_run_are_judged_by_their_class_names() -> None:
    class Never(Hybrid):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match=r"attention module mixing.inner is not part of a known unit"):
        units(Never(TorchMixing(8)))
    with pytest.warns(UserWarning, match="does not run on images of the sizes that were tried"):
        assert list(parameter_kinds(Never(None)).values())[-1] == "head"


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("seresnet50", num_classes=3),
        lambda: timm.create_model("ecaresnet26t", num_classes=3),
        lambda: timm.create_model("gcresnet50t", num_classes=3),
        lambda: timm.create_model("resnet18", num_classes=3, block_args={"attn_layer": "cbam"}),
        lambda: timm.create_model("skresnet18", num_classes=3),
        lambda: timm.create_model("efficientnet_b0", num_classes=3),
        pytest.param(lambda: timm.create_model("vgg11", num_classes=3), marks=pytest.mark.slow),
        lambda: timm.create_model("vit_base_patch32_siglip_256", num_classes=3, depth=2),
        lambda: timm.create_model("beit_base_patch16_224", num_classes=3, depth=2),
        lambda: timm.create_model("vit_tiny_r_s16_p8_224", num_classes=3),
        lambda: timm.create_model("vit_small_r26_s32_224", num_classes=3),
        models.convnext, models.alternet, lambda: models.mixer(patch_size=8), lambda: models.swin(patch_size=4),
        lambda: models.alternet(mixer="blur"),
    ],
)  # fmt: skip
def test_gates_and_known_attention_are_covered(build) -> None:
    assert missing_units(build()) == []


def test_the_model_is_given_back_as_it_was() -> None:
    model = Hybrid(None).train()
    model.stem.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    parameter_kinds(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not model.block._forward_hooks


class Ordered(nn.Module):
    """A small vision transformer whose modules are registered in an order of choice."""

    def __init__(self, order: str, side_head: bool = False) -> None:
        super().__init__()
        for key in order.split():
            if key == "head":
                self.head = nn.Linear(8, 4)
            elif key == "stem":
                self.stem = nn.Conv2d(3, 8, 4, 4)
            else:
                self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.side = nn.Linear(8, 4) if side_head else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.blocks[0](x)
        side = self.side(x[:, 0]) if self.side is not None else 0
        return self.head(self.blocks[1](x)[:, 0]) + side


@pytest.mark.parametrize("order", ["head stem blocks", "blocks head stem", "stem blocks head", "blocks stem head"])
def test_kinds_follow_the_order_of_execution(order: str) -> None:
    model = Ordered(order)
    kinds, stages = parameter_kinds(model), parameter_stages(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert {name for name, kind in kinds.items() if kind == "stem"} == {"stem.weight", "stem.bias", "token"}
    assert {name for name, kind in kinds.items() if kind == "head"} == {"head.weight", "head.bias"}
    assert stages["head.weight"] == 2
    assert stages["token"] == stages["stem.weight"] == 0
    assert kinds["blocks.1.attn.qkv.weight"] == "msa"


def test_a_head_in_the_middle_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"received 'side.weight' used before the end of the last unit without an effect"
    ):
        parameter_kinds(Ordered("stem blocks head", side_head=True))


def test_parameters_that_are_not_used_are_refused_or_stated() -> None:
    model = Ordered("stem blocks head")
    model.auxiliary = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"'auxiliary.weight' that the forward pass in eval mode does not use"):
        parameter_kinds(model)
    inside = Ordered("stem blocks head")
    inside.blocks[0].mlp.spare = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match=r"does not use have their unit's kind: blocks.0.mlp.spare"):
        assert parameter_kinds(inside)["blocks.0.mlp.spare"] == "mlp"


def test_a_compiled_model_has_the_kinds_of_its_module() -> None:
    model = Ordered("head stem blocks")
    compiled = torch.compile(model, backend="eager")
    assert list(parameter_kinds(compiled)) == [name for name, _ in compiled.named_parameters()]
    assert list(parameter_kinds(compiled).values()) == list(parameter_kinds(model).values())


class _TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 8)

    def forward(self, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.embed(patches) * mask).mean(1)


class _FlexibleAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(48, 16), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        tokens = self.embed(nn.functional.unfold(x, 4, stride=4).mT)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        attended = flex_attention(q, k, v)
        assert isinstance(attended, torch.Tensor)
        return self.head((tokens + attended[:, 0]).mean(1))


def test_a_model_that_does_not_run_on_images_says_why_and_what_to_do() -> None:
    with pytest.raises(StructureError) as error:
        vs.structure(_TwoArguments())
    text = str(error.value)
    assert text.startswith("_TwoArguments: its forward pass fails: ")
    assert "missing 1 required positional argument: 'mask'; pass images that it takes" in text
    assert "a module around it whose forward takes images (B, C, H, W) alone" in text
    with pytest.raises(StructureError, match=r"FlexAttention .*; choose another attention for measuring"):
        vs.structure(_FlexibleAttention(), torch.randn(1, 3, 8, 8))


class _CrossStage(nn.Module):
    """Two ways of which one holds blocks; the blocks of the last stage have no shortcut, as in CSPNeXt."""

    class Block(nn.Module):
        def __init__(self, width: int, shortcut: bool) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.shortcut = shortcut

        def forward(self, x: Tensor) -> Tensor:
            branch = self.conv2(F.relu(self.conv1(x)))
            return x + branch if self.shortcut else branch

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.main, self.short = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.blocks = nn.Sequential(*(self.Block(width, shortcut) for _ in range(3)))
        self.final = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        return F.relu(self.final(torch.cat([self.blocks(self.main(x)), self.short(x)], dim=1)))


def test_what_a_stage_makes_of_its_blocks_is_no_head() -> None:
    stages = [_CrossStage(8, shortcut) for shortcut in (True, True, False)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    kinds = parameter_kinds(model, torch.randn(1, 3, 32, 32))
    assert {name for name, kind in kinds.items() if kind == "head"} == {"6.weight", "6.bias"}
    assert {kinds[name] for name, _ in model.named_parameters() if name.startswith("3.")} == {"conv", "pool"}


@pytest.mark.parametrize("name", ["cspnext_m", "cspresnet50", "cs3darknet_m"])
def test_the_head_of_a_cross_stage_network_is_its_classifier(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    kinds = parameter_kinds(model)
    classifier = {f"head.fc.{part}" for part in ("weight", "bias")}
    assert {name for name, kind in kinds.items() if kind == "head"} == classifier
