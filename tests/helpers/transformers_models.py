"""Tiny vision models of Hugging Face's transformers with random weights from their configurations."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

_VIT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 2,
}
_DINO: dict[str, Any] = {**{key: value for key, value in _VIT.items() if key != "intermediate_size"}, "mlp_ratio": 2}
_SWIN: dict[str, Any] = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2, "image_size": 16}
_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 12], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model of transformers.

    Attributes:
        model: Name of the model's class.
        config: Name of the configuration's class.
        options: Of the configuration.
        side: Of the images that it takes.
        n_stages: Numbers of sizes of its map.
        n_prefix: Tokens in front of the patches.
        output: Key of the output to measure; None for its logits.
    """

    model: str
    config: str
    options: dict[str, Any]
    side: int = 8
    n_stages: int = 1
    n_prefix: int = 1
    output: str | None = None


FAMILIES = {
    "vit": Family("ViTForImageClassification", "ViTConfig", _VIT),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", _VIT, n_prefix=2),
    "beit": Family("BeitForImageClassification", "BeitConfig", _VIT),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", _DINO),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**_DINO, "num_register_tokens": 4},
        n_prefix=5,
    ),
    "swin": Family("SwinForImageClassification", "SwinConfig", _SWIN, 16, 2, 0),
    "swinv2": Family("Swinv2ForImageClassification", "Swinv2Config", _SWIN, 16, 2, 0),
    "convnext": Family("ConvNextForImageClassification", "ConvNextConfig", _CONVNEXT, 16, 2, 0),
    "convnextv2": Family("ConvNextV2ForImageClassification", "ConvNextV2Config", _CONVNEXT, 16, 2, 0),
    "segformer": Family("SegformerForImageClassification", "SegformerConfig", _SEGFORMER, 16, 2, 0),
    "segmentation": Family("SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER, 16, 2, 0),
    "clip": Family("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_VIT, "projection_dim": 3}, output="image_embeds"),
    "siglip": Family("SiglipVisionModel", "SiglipVisionConfig", _VIT, n_prefix=0, output="pooler_output"),
}  # fmt: skip


def built(name: str, double: bool = True, **options: Any) -> nn.Module:
    """Return a model in eval mode in which no parameter has a value that hides a branch, such as a layer scale of 0."""
    family = FAMILIES[name]
    options = copy.deepcopy({"num_labels": 3, **family.options, **options})  # Segformer's head reverses a list of them
    config = getattr(transformers, family.config)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double() if double else model


def images(name: str, n: int = 3, side: int | None = None) -> torch.Tensor:
    side = side or FAMILIES[name].side
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def selected(output: Any, name: str) -> torch.Tensor:
    return output[FAMILIES[name].output or "logits"]


def named_modules(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules with such a class name, but for those of a pooling or decoding head."""
    inside: list[str] = []
    for path, module in model.named_modules():
        name = type(module).__name__
        if path.startswith(tuple(f"{p}." for p in inside)):
            continue
        if re.search("PoolingHead|DecodeHead", name):
            inside.append(path)
        elif re.search(pattern, name):
            inside.append(path)
            yield path, module


def expected_units(model: nn.Module) -> Counter[str]:
    """Count units by the names of classes alone."""
    patterns = {"msa": "Attention$", "mlp": "(MLP|Intermediate)$", "conv": "ConvNext(V2)?Layer$"}
    counts = {kind: sum(1 for _ in named_modules(model, pattern)) for kind, pattern in patterns.items()}
    return +Counter(counts)
