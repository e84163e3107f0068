"""The blocks of timm and torchvision, described for `vitscope.models.structure.residual_structure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from timm.models import beit, convnext, eva, mlp_mixer, pit, resnet, resnetv2, swin_transformer, vision_transformer
from timm.models import swin_transformer_v2 as swin_v2
from torch import nn

from vitscope.core.tap import Layout
from vitscope.models.structure.residual_structure import (
    Read,
    ResidualUnit,
    is_gate,
    parts,
    replaceable_conv3x3,
    subsamples,
)


def _first(block: nn.Module, *names: str) -> nn.Module:
    """The first of the named children that exists."""
    return next(m for m in (getattr(block, name, None) for name in names) if isinstance(m, nn.Module))


def pre_norm(block: nn.Module, layout: Layout = "NLC", inner: Layout = "NLC") -> tuple[ResidualUnit, ResidualUnit]:
    """Describe x + attn(norm1(x)), then x + mlp(norm2(x)): the map after the attention half is norm2's input.

    ``layout`` is that of the block and its attention half, ``inner`` that of the MLP half.
    """
    norm1, norm2 = _first(block, "norm1"), _first(block, "norm2")
    attention = _first(block, "attn")
    return (
        ResidualUnit(
            "msa", Read(norm2, "input", inner), Read(norm1, "output", layout),
            Read(_first(block, "drop_path1", "ls1", "attn"), "output", layout), "attn",
            ("norm1", "attn", "ls1", "drop_path1", "gamma_1"), attention,
        ),
        ResidualUnit(
            "mlp", Read(block, "output", layout), Read(norm2, "output", inner),
            Read(_first(block, "drop_path2", "ls2", "mlp"), "output", inner), "mlp",
            ("norm2", "mlp", "ls2", "drop_path2", "gamma_2"),
        ),
    )  # fmt: skip


def post_norm(block: nn.Module, layout: Layout = "NLC") -> tuple[ResidualUnit, ResidualUnit]:
    """Describe x + norm1(attn(x)), then x + norm2(mlp(x)): without a norm before, branches read the stream."""
    mlp = _first(block, "mlp")
    return (
        ResidualUnit(
            "msa", Read(mlp, "input", "NLC"), Read(block, "input", layout),
            Read(_first(block, "drop_path1"), "output", layout), "attn",
            ("attn", "norm1", "ls1", "drop_path1"), _first(block, "attn"),
        ),
        ResidualUnit(
            "mlp", Read(block, "output", layout), Read(mlp, "input", "NLC"),
            Read(_first(block, "drop_path2"), "output", "NLC"), "mlp",
            ("mlp", "norm2", "ls2", "drop_path2"),
        ),
    )  # fmt: skip


@parts.register(vision_transformer.Block)
@parts.register(beit.Block)
@parts.register(eva.EvaBlock)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return pre_norm(block)


@parts.register(vision_transformer.ResPostBlock)
@parts.register(eva.EvaBlockPostNorm)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return post_norm(block)


@parts.register(swin_transformer.SwinTransformerBlock)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return pre_norm(block, "NHWC")


@parts.register(swin_v2.SwinTransformerV2Block)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return post_norm(block, "NHWC")


@parts.register(mlp_mixer.MixerBlock)
def _(block: mlp_mixer.MixerBlock) -> tuple[ResidualUnit, ...]:
    return (  # one drop_path serves both halves, so the branches end at the two MLPs
        ResidualUnit(
            "mlp", Read(block.norm2, "input", "NLC"), Read(block.norm1, "output", "NLC"),
            Read(block.mlp_tokens, "output", "NCL"), "mlp_tokens", ("norm1", "mlp_tokens"),
        ),
        ResidualUnit(
            "mlp", Read(block, "output", "NLC"), Read(block.norm2, "output", "NLC"),
            Read(block.mlp_channels, "output", "NLC"), "mlp_channels", ("norm2", "mlp_channels"),
        ),
    )  # fmt: skip


@parts.register(pit.Pooling)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return (ResidualUnit("pool", Read(block), subsamples=True),)


@parts.register(swin_transformer.PatchMerging)
@parts.register(swin_v2.PatchMerging)
def _(block: nn.Module) -> tuple[ResidualUnit, ...]:
    return (ResidualUnit("pool", Read(block, layout="NHWC"), subsamples=True),)


@parts.register(convnext.ConvNeXtStage)
def _(stage: convnext.ConvNeXtStage) -> tuple[ResidualUnit, ...]:
    if isinstance(stage.downsample, nn.Identity):
        return ()
    return (
        ResidualUnit("pool", Read(stage.downsample), suffix="downsample", children=("downsample",), subsamples=True),
    )


@parts.register(convnext.ConvNeXtBlock)
def _(block: convnext.ConvNeXtBlock) -> tuple[ResidualUnit, ...]:
    out = Read(block.drop_path)  # the norm sits after the first convolution: the branch reads the stream
    return (ResidualUnit("conv", Read(block), Read(block, "input"), out, subsamples=subsamples(block)),)


@parts.register(resnet.BasicBlock)
@parts.register(resnet.Bottleneck)
@parts.register(resnetv2.Bottleneck)
def post_activation(block: nn.Module) -> tuple[ResidualUnit, ...]:
    """act(branch(x) + shortcut(x)): the branch reads the stream and ends at its last norm, SE or drop path."""
    out = _first(block, "drop_path", "se", "bn3", "norm3", "bn2", "norm2")
    return (_conv(block, Read(_first(block, "conv1"), "input"), Read(out)),)


@parts.register(resnetv2.PreActBasic)
@parts.register(resnetv2.PreActBottleneck)
def _(block: resnetv2.PreActBasic) -> tuple[ResidualUnit, ...]:
    # a norm with its activation inside: the input of the latter is the norm's output
    norm = cast(nn.Module, block.norm1)
    return (_conv(block, Read(_first(norm, "act"), "input"), Read(block.drop_path)),)


def _conv(block: nn.Module, branch_in: Read, branch_out: Read) -> ResidualUnit:
    return ResidualUnit(
        "conv", Read(block), branch_in, branch_out, conv3x3=replaceable_conv3x3(block), subsamples=subsamples(block)
    )


@parts.register(nn.Module)
def by_structure(block: nn.Module) -> tuple[ResidualUnit, ...]:
    """Blocks that are known by name (torchvision's) or by their children (hand-written ResNet blocks)."""
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    if name == "torchvision.models.vision_transformer.EncoderBlock":
        return _torchvision_encoder(block)
    if name == "torchvision.models.swin_transformer.SwinTransformerBlock":
        return _torchvision_swin(block)
    if name == "torchvision.models.swin_transformer.PatchMerging":
        return (ResidualUnit("pool", Read(block, layout="NHWC"), subsamples=True),)
    if name == "torchvision.models.convnext.CNBlock":
        return (ResidualUnit("conv", Read(block), Read(block, "input"), Read(_first(block, "stochastic_depth"))),)
    children = dict(block.named_children())
    layers = [child for child in children if child[:-1] in ("conv", "bn")]
    has_shortcut = hasattr(block, "shortcut") or hasattr(block, "downsample")
    if not (has_shortcut and {"conv1", "conv2", "bn1", "bn2"} <= set(layers)):
        return ()
    first = Read(children["bn1"]) if layers[0] == "bn1" else Read(children["conv1"], "input")
    return (_conv(block, first, Read(_branch_end(block, children, layers))),)


def _branch_end(block: nn.Module, children: Mapping[str, nn.Module], layers: Sequence[str]) -> nn.Module:
    """Return the last layer of the branch of a hand-written block: a gate after its last norm or convolution belongs to it.

    Raises:
        ValueError: Other weights of the block, whose place in the branch its children do not tell.
    """
    names, end = list(children), children[layers[-1]]
    for name, module in children.items():
        if name in layers or name in ("shortcut", "downsample") or not any(True for _ in module.parameters()):
            continue
        if not is_gate(module) or names.index(name) < names.index(layers[-1]):
            raise _unclear(block, f"a child {name!r} ({type(module).__name__})")
        end = module
    for name, _ in block.named_parameters(recurse=False):
        raise _unclear(block, f"a parameter {name!r}")
    return end


def _unclear(block: nn.Module, what: str) -> ValueError:
    kind = type(block).__name__
    return ValueError(
        f"Expected a residual block of convolutions and norms, received {kind} with {what} whose place in the branch is not "
        f"known: describe it, @vitscope.models.structure.parts.register({kind}), or pass taps=[...] and units=[...]."
    )


def _torchvision_encoder(block: nn.Module) -> tuple[ResidualUnit, ...]:
    ln_1, ln_2 = _first(block, "ln_1"), _first(block, "ln_2")
    return (
        ResidualUnit(
            "msa", Read(ln_2, "input", "NLC"), Read(ln_1, layout="NLC"), Read(_first(block, "dropout"), layout="NLC"),
            "self_attention", ("ln_1", "self_attention"),
        ),
        ResidualUnit(
            "mlp", Read(block, layout="NLC"), Read(ln_2, layout="NLC"), Read(_first(block, "mlp"), layout="NLC"),
            "mlp", ("ln_2", "mlp"),
        ),
    )  # fmt: skip


def _torchvision_swin(block: nn.Module) -> tuple[ResidualUnit, ...]:
    norm1, norm2 = _first(block, "norm1"), _first(block, "norm2")
    return (
        ResidualUnit(
            "msa", Read(norm2, "input", "NHWC"), Read(norm1, layout="NHWC"),
            Read(_first(block, "attn"), layout="NHWC"), "attn", ("norm1", "attn"),
        ),
        ResidualUnit(
            "mlp", Read(block, layout="NHWC"), Read(norm2, layout="NHWC"),
            Read(_first(block, "mlp"), layout="NHWC"), "mlp", ("norm2", "mlp"),
        ),
    )  # fmt: skip
