"""Checkpoints of the official release and of timm 0.5.4, loaded into today's models with every key accounted for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.pit import PoolingVisionTransformer
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vitscope.models.alternet import AlterNet
from vitscope.models.state_dicts import default_keys

_RESNET = (
    (r"layer0\.0\.", "conv1."),
    (r"layer0\.1\.", "bn1."),
    (r"(layer\d\.\d+)\.conv(\d)\.0\.", r"\1.conv\2."),
    (r"(layer\d\.\d+)\.conv(\d)\.1\.", r"\1.bn\2."),
    (r"(layer\d\.\d+)\.shortcut\.", r"\1.downsample."),
    (r"classifier\.0\.dense\.", "fc."),
)
_PREACT = (
    (r"(layer\d\.\d+)\.conv([23])\.0\.", r"\1.norm\2."),
    (r"(layer\d\.\d+)\.conv([23])\.2\.", r"\1.conv\2."),
    (r"(layer\d\.\d+)\.bn\.", r"\1.norm1."),
    (r"classifier\.0\.bn\.", "norm."),
)
_CONV_SHORTCUT = (r"(layer\d\.\d+)\.shortcut\.0\.", r"\1.downsample.conv.")
_RESNETV2 = (
    *_PREACT,
    _CONV_SHORTCUT,
    (r"layer0\.0\.", "stem.conv."),
    (r"classifier\.0\.dense\.", "head.fc."),
)
_ALTERNET = (
    *_PREACT,
    (r"\.attn\.pos_embedding$", ".attn.position_bias"),
    (r"\.attn\.attn\.to_out\.0\.", ".attn.proj."),
    (r"layer0\.layer0\.0\.", "stem.0."),
    (r"classifier\.0\.dense\.", "fc."),
)
_DROPPED = ("attn_mask", "relative_position_index")


def load_official_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load weights under the official code's or timm 0.5.4's key names; logits stay the same to rounding.

    Knows the official ResNet, ResNeXt, pre-activation ResNet and AlterNet (any depth, stem and window), and ViT,
    PiT and Swin as timm 0.5.4 named them (pooling and downsampling have moved to the next stage since). Keys
    that fit already are taken as they are. A checkpoint's ``state_dict`` entry is unwrapped.
    Counters of batches (``num_batches_tracked``) may be absent, as in files of old versions of torch.
    ``attn_mask`` and ``relative_position_index`` are dropped: today's models compute them. Where they disagree
    with the model's, a warning says so.

    Args:
        model: A model of the same architecture, built by `vitscope.models` or timm.
        state_dict: Tensors by name.

    Returns:
        The model.

    Raises:
        ValueError: If a key is left over, a parameter of the model gets nothing, or a shape differs.
    """
    state = _unwrap(state_dict)
    expected = model.state_dict()
    if set(state) != set(expected):
        state = _without_computed(model, state)
        state = _renamed(model, state)
    unknown = sorted(set(state) - set(expected))
    missing = sorted(set(expected) - set(state) - default_keys(model))
    if unknown or missing:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: {len(unknown)} keys left over {unknown[:3]}, "
            f"{len(missing)} keys missing {missing[:3]}."
        )
    model.load_state_dict(
        {name: _shaped(name, state[name], value.shape) for name, value in expected.items() if name in state}
    )
    return model


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            return _unwrap(state_dict[key])
    return {name.removeprefix("module."): value for name, value in state_dict.items() if isinstance(value, Tensor)}


def _without_computed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what the model computes itself, with a warning where the checkpoint's values differ."""
    buffers = dict(model.named_buffers())
    kept_names = {}
    for name, value in state.items():
        if name.rpartition(".")[2] not in _DROPPED:
            kept_names[name] = value
            continue
        model_buffer = buffers.get(name)
        if (
            model_buffer is None
            or model_buffer.shape != value.shape
            or not torch.equal(model_buffer.cpu().to(value.dtype), value.cpu())
        ):
            warnings.warn(f"{name} of the checkpoint differs from the model's, which is used.", stacklevel=3)
    return kept_names


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, ResNet):
        return {_replace(name, _RESNET): value for name, value in state.items()}
    if isinstance(model, ResNetV2):
        names = {name: _replace(name, _RESNETV2) for name in state}
        return {_staged(new, ".blocks"): state[old] for old, new in names.items()}
    if isinstance(model, AlterNet):
        return _alternet(model, state)
    if isinstance(model, PoolingVisionTransformer):
        return {_later(name, "transformers", "pool"): value for name, value in state.items()}
    if isinstance(model, SwinTransformer):
        moved = {_later(name, "layers", "downsample"): value for name, value in state.items()}
        return {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name): value for name, value in moved.items()}
    return state


def _replace(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply the first rule whose pattern occurs at the start of the name or, with a leading dot, anywhere."""
    for pattern, new in rules:
        if re.search(pattern if pattern.startswith(r"\.") else "^" + pattern, name):
            return re.sub(pattern, new, name, count=1)
    return name


def _staged(name: str, inner: str) -> str:
    """layer2.0 -> stages.1.blocks.0 (timm) or stages.1.0 (AlterNet)."""
    return re.sub(r"^layer(\d)\.", lambda match: f"stages.{int(match[1]) - 1}{inner}.", name)


def _later(name: str, stages: str, child: str) -> str:
    """transformers.0.pool -> transformers.1.pool: timm moved it from the end of a stage to the next one's start."""
    return re.sub(rf"^{stages}\.(\d+)\.{child}\.", lambda match: f"{stages}.{int(match[1]) + 1}.{child}.", name)


def _alternet(model: AlterNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of blocks, and queries, keys and values in one tensor."""
    model_keys = set(model.state_dict())
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".to_kv.weight"):
            continue
        if name.endswith(".to_q.weight"):
            pair = name.replace(".to_q.", ".to_kv.")
            new = _staged(name.replace(".attn.attn.to_q.", ".attn.qkv."), "")
            renamed[new] = torch.cat((value, state[pair])) if pair in state else value
            continue
        new = _staged(_replace(name, _ALTERNET), "")
        shortcut = _staged(_replace(name, (_CONV_SHORTCUT,)), "")
        if shortcut != new and "shortcut" in name:  # timm's convolution blocks keep theirs one level deeper
            new = shortcut if shortcut in model_keys else shortcut.replace(".downsample.conv.", ".downsample.")
        renamed[new] = value
    return renamed


def _shaped(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A 1x1 convolution's weight for a linear layer, or the other way, or one bias table: only axes of length 1 may differ."""
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)} in the checkpoint, the model needs {tuple(shape)}.")
    return value.reshape(shape)
