from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from vitscope.config.loading import MODEL_HINTS
from vitscope.models.structure.capabilities import ModelCapabilities

FOLDER = Path(__file__).parents[2] / "conf" / "model"
#: configurations of models; that of other packages' networks names none
CONFIGS = sorted(
    file.stem for file in FOLDER.glob("*.yaml") if not OmegaConf.is_missing(OmegaConf.load(file), "_target_")
)


def stated_capabilities(name: str) -> ModelCapabilities:
    """Return what conf/model/<name>.yaml states that the model has; all where it states nothing."""
    file: Any = OmegaConf.load(FOLDER / f"{name}.yaml")
    return ModelCapabilities(**file.get("capabilities", {}))


def from_config(name: str, num_classes: int = 3, image_size: int = 32, **changes: Any) -> nn.Module:
    """Build the model of conf/model/<name>.yaml, without Hydra, in float64 and eval mode, with random norms."""
    file = OmegaConf.load(FOLDER / f"{name}.yaml")
    config = OmegaConf.create({"data": {"num_classes": num_classes, "image_size": image_size}, "model": file})
    options = OmegaConf.to_container(config, resolve=True)["model"]
    module, _, function = options.pop("_target_").rpartition(".")
    options = {key: value for key, value in options.items() if key not in MODEL_HINTS}
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), function)(**options | changes).double().eval()
    if isinstance(stated := getattr(model, "pretrained_cfg", None), dict):
        stated["input_size"] = (3, image_size, image_size)  # the size at which the model's structure is observed
    with torch.no_grad():
        for name_, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name_.endswith(("cls_token", "reg_token", "gamma")):  # near zero in a fresh model
                tensor.uniform_(0.1, 0.5)
            elif name_.endswith(("running_mean", "running_var", "bias")) or tensor.ndim == 1:
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model
