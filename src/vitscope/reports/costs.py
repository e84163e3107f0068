"""What a model costs: its parameters and the floating-point operations of one image, without computing anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscope import build, config, results
from vitscope.reports.evidence import Entry


@dataclass(frozen=True)
class Cost:
    """Of a model.

    Attributes:
        parameters: tied ones once.
        flops: of a forward pass of one image: two for each multiply-add of matrix products, convolutions and attention.
        why: the reason where the model could not be built (both are then None).
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


class Costs:
    """Costs of the runs' models, counted once for each architecture and kept in a file.

    Args:
        file: where counts are kept between reports; None keeps none.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, Cost] = {}
        if file is not None and file.is_file():
            try:
                self._known = {key: Cost(**value) for key, value in json.loads(file.read_text()).items()}
            except (ValueError, TypeError):
                self._known = {}  # damaged: counted again

    def of(self, entry: Entry) -> Cost:
        """Return the cost of a run's model."""
        node = {**(entry.config.get("model") or {}), "pretrained": False}
        data = entry.config.get("data") or {}
        shape = (int(node.get("in_chans", 3)), *(2 * [int(data.get("image_size") or node.get("image_size") or 224)]))
        key = config.digest([node, shape, torch.__version__], 16)
        if key not in self._known:
            self._known[key] = _counted(entry.config, shape)
        return self._known[key]

    def save(self) -> None:
        """Write the counts down."""
        if self._file is not None:
            known = {key: vars(cost) for key, cost in self._known.items() if not cost.why}
            results.write_atomically(self._file, json.dumps(known).encode())


def _counted(cfg: Mapping[str, Any], image: tuple[int, ...]) -> Cost:
    node = dict(cfg.get("model") or {})
    if "pretrained" in node:
        node["pretrained"] = False  # the weights do not matter
    composed = OmegaConf.create({"model": node, "seed": 0})
    reason = ""
    for device in ("meta", "cpu"):  # a model that looks at its weights while it is built needs a real device
        try:
            with torch.device(device):
                return count(build.model(composed), image)
        except Exception as error:  # whatever a model of the user's raises: the cell says so
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Cost(None, None, reason)
