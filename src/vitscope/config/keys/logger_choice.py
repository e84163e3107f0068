"""Loggers beside W&B that a configuration chooses: their keys, and whether their packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from vitscope.config import loading
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

#: packages of which a logger needs one, by its name in ``conf/logger``; the first is the one to install
PACKAGES: dict[str, tuple[str, ...]] = {
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}

#: files that ``logger.artifacts`` uploads to W&B: folders of a run, and the endings of the files in them
ARTIFACT_KINDS: dict[str, tuple[str, ...]] = {"results": (".npz", ".json"), "checkpoints": (".ckpt", ".json")}


def chosen_loggers(node: Any) -> dict[str, dict[str, Any]]:
    """Return the options of each chosen logger beside W&B by its name.

    Args:
        node: ``cfg.logger``, resolved or not.
    """
    plain = loading.plain(node) or {}
    return {str(name): options for name, options in plain.items() if isinstance(options, dict)}


def without_loggers(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of W&B in ``logger``."""
    return {key: value for key, value in node.items() if not isinstance(value, Mapping)}


def check_loggers(node: Any, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the loggers beside W&B, and what is uploaded to W&B.

    Args:
        node: ``logger`` of a resolved configuration.
        options: Options of each logger with their defaults.

    Raises:
        ConfigError: An unknown artifact, logger or option, a value of another type, or a package that is not installed.
    """
    kinds = node.get("artifacts") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in ARTIFACT_KINDS:
            raise ConfigError("logger.artifacts", kind, "no such artifact", errors.nearest(str(kind), ARTIFACT_KINDS))
    for name, values in chosen_loggers(node).items():
        if name not in PACKAGES:
            raise ConfigError(f"logger.{name}", "...", "no such logger", errors.nearest(name, [*PACKAGES, "wandb"]))
        _check_options(name, values, options[name])
        if not is_installed(name):
            package = PACKAGES[name][0]
            fix = f"pip install {package}, or choose logger=csv"
            raise ConfigError("logger", name, f"the package {package} is not installed", fix)


def is_installed(name: str) -> bool:
    """Tell whether a logger's package is installed; it is not imported."""
    packages = PACKAGES[name]
    return not packages or any(importlib.util.find_spec(package) is not None for package in packages)


def _check_options(name: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options that a logger does not have, and values of another type than the default's."""
    for key, value in values.items():
        default = defaults.get(key)
        if default is None:
            raise ConfigError(f"logger.{name}.{key}", value, "no such key", errors.nearest(key, defaults))
        if type(value) is not type(default) or (isinstance(value, int) and value < 1):
            kind = "a text" if isinstance(default, str) else "a whole number from 1 on"
            raise ConfigError(f"logger.{name}.{key}", value, f"not {kind}", f"set {key}={default}")
