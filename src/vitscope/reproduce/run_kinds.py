"""Kinds of runs and measurements: digests of the settings on which time and disk space depend, from resolved configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from vitscope.config import loading


def measurement_kind(cfg: Mapping[str, Any], analysis: str, node: Mapping[str, Any]) -> str:
    """Return a digest of what decides how long a measurement takes: the model, the size of the images, the settings.

    Args:
        cfg: Resolved configuration of the run.
        analysis: Name of the analysis.
        node: Resolved configuration of the analysis.
    """
    settings = {key: value for key, value in node.items() if key not in ("seed", "when", "on_error")}
    settings["probe"] = {key: value for key, value in (node.get("probe") or {}).items() if key != "seed"}
    return loading.digest([model_kind(cfg), cfg["data"].get("image_size"), analysis, settings], 16)


def measurement_kinds(cfg: DictConfig) -> dict[str, str]:
    """Return the kind of each analysis of a composed configuration by the analysis's name."""
    resolved = loading.plain(cfg)
    return {name: measurement_kind(resolved, name, node) for name, node in resolved["analysis"].items()}


def model_kind(cfg: Mapping[str, Any]) -> str:
    """Return a digest of the model: its configuration without hints."""
    return loading.digest({key: value for key, value in cfg["model"].items() if key not in loading.MODEL_HINTS})


def training_kind(cfg: Mapping[str, Any]) -> str:
    """Return a digest of what decides how long a step takes: model, batch, image size, optimizer and trainer."""
    data, trainer = cfg["data"], cfg["trainer"]
    return loading.digest([
        model_kind(cfg), data.get("image_size"), data.get("batch_size"), cfg["optimizer"].get("_target_"),
        *(trainer.get(key) for key in ("accelerator", "precision", "devices", "num_nodes", "accumulate_grad_batches")),
        bool(cfg.get("compile")), bool(cfg.get("channels_last")),
    ])  # fmt: skip


def data_kind(cfg: Mapping[str, Any]) -> str:
    """Return a digest of what decides how many steps an epoch has: the data set, its share, the batch and the limits."""
    data, trainer = cfg["data"], cfg["trainer"]
    source = data.get("source") or {}
    return loading.digest([
        data.get("name"), data.get("fraction"), data.get("batch_size"), data.get("drop_last"), source.get("val_share"),
        *(trainer.get(key) for key in ("limit_train_batches", "devices", "num_nodes", "accumulate_grad_batches")),
    ])  # fmt: skip


def files_kind(cfg: Mapping[str, Any]) -> str:
    """Return a digest of what decides the size of a run's folder: the model, the optimizer's state and the kept checkpoints."""
    return loading.digest(
        [
            model_kind(cfg),
            cfg["optimizer"].get("_target_"),
            (cfg.get("callbacks") or {}).get("checkpoint"),
            # epochs and steps decide how many snapshots there are
            cfg["trainer"].get("max_epochs"),
            cfg["trainer"].get("max_steps"),
        ]
    )
