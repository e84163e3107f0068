"""Which of the paper's families a model belongs to: ours by their builder, any other by the kinds of its taps."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from vitscope import build
from vitscope.models.taps import Tap, taps
from vitscope.reports import identity


def kin(cfg: Mapping[str, Any]) -> str:
    """Return the family whose claims a run's model is evidence for; a timm model that is like none keeps its name.

    Args:
        cfg: a run's configuration.
    """
    node = cfg.get("model") or {}
    if not str(node.get("_target_", "")).endswith(".timm_model"):
        return identity.family(cfg)
    data = cfg.get("data") or {}
    plain = {**node, "pretrained": False, "image_size": data.get("image_size") or node.get("image_size")}
    return _by_taps(json.dumps(plain, sort_keys=True, default=str)) or identity.family(cfg)


@functools.cache
def _by_taps(node: str) -> str:
    try:
        with torch.device("meta"):  # nothing is computed, no memory is taken
            return family_of(taps(build.model(OmegaConf.create({"model": json.loads(node), "seed": 0}))))
    except Exception:  # a model that cannot be built here, or has no unit that is known: it is none of the families
        return ""


def family_of(found: list[Tap]) -> str:
    """Return the family that units and stages tell, or an empty text.

    Attention and MLPs in one stage: ``vit``; in several, on maps cut in windows (channels last): ``swin``, on tokens:
    ``pit``. Residual convolutions that subsample inside their blocks: ``convnet``. Convolutions and attention in turn:
    ``alternet``. MLPs alone: ``mixer``.

    Args:
        found: the model's taps.
    """
    units = [tap for tap in found if tap.kind in ("conv", "msa", "mlp")]
    kinds = {tap.kind for tap in units}
    stages = {tap.stage for tap in units}
    if kinds == {"msa", "mlp"}:
        if len(stages) == 1:
            return "vit"
        return "swin" if any(tap.layout == "NHWC" for tap in units) else "pit"
    residual = any(tap.kind == "stem" for tap in found)
    if kinds == {"conv"} and residual and not any(tap.kind == "pool" for tap in found):
        return "convnet"
    return {frozenset({"conv", "msa"}): "alternet", frozenset({"mlp"}): "mixer"}.get(frozenset(kinds), "")
