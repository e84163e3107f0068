"""Facts of a run's model for its provenance: parameters, operations of one image, the family that its units tell.

They are recorded where the model is built anyway, so that a report never builds one from a run's configuration, which may be
a stranger's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscope.config import factories, loading
from vitscope.core.tap import Tap
from vitscope.models.structure.taps import known_taps

#: key of the facts in ``provenance.json``
KEY = "model"

#: why an older run's cost is not known
UNRECORDED = "not in the run's provenance (an older run): analyze.py run=<folder> records it"


@dataclass(frozen=True)
class Cost:
    """Size and cost of a model.

    Attributes:
        parameters: Tied ones once.
        flops: Floating-point operations of a forward pass of one image: two for each multiply-add of matrix products,
            convolutions and attention.
        why: The reason where they are not known (both are then None).
    """

    parameters: int | None
    flops: int | None
    why: str = ""


def count(model: torch.nn.Module, image: tuple[int, ...]) -> Cost:
    """Return the cost of a model for an image ``(C, H, W)``; on the ``meta`` device nothing is computed.

    Operations are counted by `torch.utils.flop_counter`; attention as the two matrix products that it is.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)  # the counter's hooks trip over parameters that modules take as inputs
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(torch.empty(1, *image, device=device, dtype=dtype))
    return Cost(parameters, int(counter.get_total_flops()))


def of_model(cfg: DictConfig) -> dict[str, Any]:
    """Return ``{"parameters", "flops", "family", "why"}`` of ``cfg.model``, from a second copy without weights.

    ``family`` is empty where the units tell none; ``why`` is the reason where the model could not be counted.
    """
    node = dict(loading.plain(cfg.model))
    if "pretrained" in node:
        node["pretrained"] = False  # the weights do not matter
    data = cfg.get("data") or {}
    size = data.get("image_size") or node.get("image_size") or 224
    has_own_size = data.get("transform") == "model"
    composed = OmegaConf.create({"model": node, "seed": 0, "data": {"transform": "model"} if has_own_size else {}})
    reason = ""
    for device in ("meta", "cpu"):  # a model that looks at its weights while it is built needs a real device
        try:
            with torch.device(device):
                model = factories.model(composed)
                family = _family(model)
                cost = count(model, (int(node.get("in_chans", 3)), *_pair(size)))
            return {"parameters": cost.parameters, "flops": cost.flops, "family": family, "why": ""}
        except Exception as error:  # whatever a model of the user's raises: the provenance says so
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return {"parameters": None, "flops": None, "family": "", "why": reason[:300]}


def recorded_cost(facts: Mapping[str, Any]) -> Cost:
    """Return the cost that a run's provenance holds; values that `of_model` cannot have written count as none."""
    noted = facts.get(KEY)
    if not isinstance(noted, Mapping):
        return Cost(None, None, UNRECORDED)
    sizes = [value if type(value) is int and value >= 0 else None for value in map(noted.get, ("parameters", "flops"))]
    if None in sizes:
        return Cost(None, None, str(noted.get("why") or "its provenance holds no count")[:300])
    return Cost(sizes[0], sizes[1])


def family_of(model_taps: Sequence[Tap]) -> str:
    """Return the family that units and stages tell, or an empty text.

    Attention and MLPs in one stage: ``vit``; in several, on maps cut in windows (channels last): ``swin``, on tokens:
    ``pit``. Residual convolutions that subsample inside their blocks: ``convnet``. Convolutions and attention in turn:
    ``alternet``. MLPs alone: ``mixer``.

    Args:
        model_taps: The model's taps.
    """
    units = [tap for tap in model_taps if tap.kind in ("conv", "msa", "mlp")]
    kinds = {tap.kind for tap in units}
    stages = {tap.stage for tap in units}
    if kinds == {"msa", "mlp"}:
        if len(stages) == 1:
            return "vit"
        return "swin" if any(tap.layout == "NHWC" for tap in units) else "pit"
    residual = any(tap.kind == "stem" for tap in model_taps)
    if kinds == {"conv"} and residual and not any(tap.kind == "pool" for tap in model_taps):
        return "convnet"
    return {frozenset({"conv", "msa"}): "alternet", frozenset({"mlp"}): "mixer"}.get(frozenset(kinds), "")


def _family(model: torch.nn.Module) -> str:
    try:
        return family_of(known_taps(model))
    except Exception:  # a model without a unit that is known is none of the families
        return ""


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Sequence) and not isinstance(size, str):
        return int(size[0]), int(size[-1])
    return int(size), int(size)
