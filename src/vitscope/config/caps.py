"""Upper bounds on the sizes of a composed configuration (`caps=smoke`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vitscope.runtime.errors import ConfigError

#: limits of batches by cap; steps an epoch rather than in all: an epoch that max_steps cuts short would not be validated
_BATCH_LIMITS = {"steps": ("limit_train_batches",), "eval_batches": ("limit_val_batches", "limit_test_batches")}


def apply_caps(cfg: DictConfig) -> None:
    """Lower the sizes of a composed configuration to the upper bounds in ``cfg.caps``; nothing is added or raised.

    ``epochs``, ``steps`` (an epoch) and ``eval_batches`` bound the trainer; every other name bounds the key of that
    name wherever it stands in ``analysis``; a list of numbers keeps those up to the bound.

    Raises:
        ConfigError: A bound that is none.
    """
    caps = {name: bound for name, bound in dict(cfg.get("caps") or {}).items() if bound is not None}
    for name, bound in caps.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < float("inf"):
            raise ConfigError(f"caps.{name}", bound, "not a positive number", "set it to 64, or to null for no bound")
    _cap_trainer(cfg.get("trainer") or {}, caps)
    if cfg.get("analysis"):
        _cap(cfg.analysis, {name: bound for name, bound in caps.items() if name not in ("epochs", *_BATCH_LIMITS)})


def _cap_trainer(trainer: Any, caps: Mapping[str, Any]) -> None:
    """Lower the numbers of epochs and of batches."""
    if "epochs" in caps and "max_epochs" in trainer:
        value, bound = trainer["max_epochs"], caps["epochs"]
        if value is None or (isinstance(value, int) and (value == -1 or value > bound)):  # other kinds validate refuses
            trainer["max_epochs"] = bound
    for cap, keys in _BATCH_LIMITS.items():
        if cap in caps:
            for key in keys:
                if key in trainer and _exceeds(trainer[key], caps[cap]):
                    trainer[key] = caps[cap]


def apply_analysis_caps(cfg: DictConfig) -> None:
    """Lower the sizes in ``cfg.analysis`` alone to the upper bounds in ``cfg.caps``.

    Raises:
        ConfigError: A bound that is none.
    """
    trainer = cfg.get("trainer")
    trainer_settings = copy.deepcopy(trainer)
    apply_caps(cfg)
    if trainer_settings is not None:
        cfg.trainer = trainer_settings


def _exceeds(limit: Any, bound: float) -> bool:
    """Tell whether a limit of batches lies above a bound; a share of them always may."""
    return limit is None or (isinstance(limit, float) and 0 < limit <= 1) or (type(limit) is int and limit > bound)


def _cap(node: Any, caps: Mapping[str, Any]) -> None:
    for key in list(node):
        value: Any = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_dict(value):
            _cap(value, caps)
        elif key in caps and isinstance(value, ListConfig):
            node[key] = [v for v in value if v <= caps[key]]
        elif key in caps and (value is None or (isinstance(value, int | float) and value > caps[key])):
            node[key] = caps[key]
