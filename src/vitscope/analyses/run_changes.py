"""Find the values of a run's network and images that a command changed: they name its results, beside the measure's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity, loading

#: modules of sources whose images are the same in every folder: known by checksums or by name, or made here
_SAME_IN_EVERY_FOLDER = tuple(
    f"vitscope.data.sources.{name}." for name in ("cifar", "digits", "huggingface", "photos", "shapes")
)


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
    folder = _folder(cfg)
    return changes | ({"data.root": folder} if folder != _folder(run_config) else {})


def _flat_model(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = experiment_identity.flattened({"model": loading.plain(config.get("model")) or {}})
    return {key: value for key, value in flat.items() if key not in experiment_identity.INCIDENTAL}


def _folder(config: Mapping[str, Any]) -> str | None:
    """Return the folder of images; None where the images do not depend on it."""
    data = loading.plain(config.get("data")) or {}
    target = str((data.get("source") or {}).get("_target_"))
    if data.get("root") is None or target.startswith(_SAME_IN_EVERY_FOLDER):
        return None
    return str(Path(str(data["root"])).expanduser().absolute())
