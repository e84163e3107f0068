"""Find the values of a run's network and images that a command changed: they name its results, beside the measure's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitscope.config import experiment_identity, loading


def changed_values(cfg: Mapping[str, Any], run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the network and the folder of images that are not the run's, by their dotted keys.

    Weights do not tell all of a network (the number of heads of a ViT, the padding of a window), nor the name ``folder`` the
    images: a result of the run is not one of the changed network or of another folder.

    Args:
        cfg: Configuration of an analysis of the run.
        run_config: Configuration of the run.
    """
    model, own_model = (_flat_model(config) for config in (cfg, run_config))
    names = sorted(model.keys() | own_model.keys())
    changes = {name: model.get(name) for name in names if model.get(name) != own_model.get(name)}
    folder = experiment_identity.image_folder(cfg)
    is_another = folder is not None and folder != experiment_identity.image_folder(run_config)
    return changes | ({"data.root": str(folder)} if is_another else {})


def _flat_model(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = experiment_identity.flattened({"model": loading.plain(config.get("model")) or {}})
    return {key: value for key, value in flat.items() if key not in experiment_identity.INCIDENTAL}
