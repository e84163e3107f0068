"""Notice of images that are normalized otherwise than timm records for the network."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

_logger = logging.getLogger(__name__)

#: where a network of timm comes from
_TIMM = "vitscope.models.timm_model"
#: sources of image files, whose normalization no data set states
_OF_FILES = ("vitscope.data.sources.folder.load", "vitscope.data.sources.huggingface.load")
#: mean and standard deviation that are rounded differ by less
_ROUNDING = 5e-3


def note_other_normalization(cfg: DictConfig, network: nn.Module, chosen_keys: Collection[str], has_file: bool) -> None:
    """Log in one line where timm records another mean or standard deviation than the images have.

    Nothing is logged where the command names them, nor for a file of weights on a data set with statistics of its own.

    Args:
        cfg: Validated configuration without a run.
        network: The network.
        chosen_keys: Keys that the command line set.
        has_file: Whether the weights are those of a file.
    """
    data, recorded = cfg.get("data") or {}, getattr(network, "pretrained_cfg", None)
    if cfg.model.get("_target_") != _TIMM or not isinstance(recorded, dict) or data.get("transform") == "model":
        return
    is_of_files = (data.get("source") or {}).get("_target_") in _OF_FILES
    is_trained = cfg.model.get("pretrained") or (has_file and is_of_files)
    if not is_trained or {"data.mean", "data.std"} & set(chosen_keys):
        return
    if all(_are_close(data.get(key), recorded.get(key)) for key in ("mean", "std")):
        return
    stated, recorded_values = ([_listed(values.get(key)) for key in ("mean", "std")] for values in (data, recorded))
    _logger.info(
        f"note: images are normalized by data.mean={stated[0]} data.std={stated[1]}, timm records {recorded_values[0]} and "
        f"{recorded_values[1]} for {cfg.model.get('name')}: set those that the weights were trained with "
        "(data.transform=model takes timm's, with its size and crop)"
    )


def _are_close(stated: Any, recorded: Any) -> bool:
    if not stated or not recorded or len(stated) != len(recorded):
        return True  # nothing to compare
    return all(abs(a - b) <= _ROUNDING for a, b in zip(stated, recorded))


def _listed(values: Sequence[float] | None) -> str:
    return f"[{','.join(f'{value:g}' for value in values or ())}]"
