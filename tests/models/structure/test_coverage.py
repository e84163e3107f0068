from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from timm.models.resnet import BasicBlock
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


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="torch 2.10 runs FlexAttention in a traced pass, 2.14 refuses"
)
def test_an_attention_that_cannot_be_traced_says_what_to_do() -> None:
    with pytest.raises(StructureError, match=r"FlexAttention .*; choose another attention for measuring"):
        vs.structure(_FlexibleAttention(), torch.randn(1, 3, 8, 8))
