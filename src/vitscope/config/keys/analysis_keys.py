"""Checks of the nodes ``analysis.<name>``: options of the measure, which images it measures, and when."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitscope.config import instantiate, loading, target_allowlist
from vitscope.config.loading import NODE_KEYS
from vitscope.config.ranges.library_options import MeasurementTimes, ProbeOptions
from vitscope.config.signature_checks import check_node, fits, shown, type_text
from vitscope.core.checks.option_checks import check_options
from vitscope.runtime import errors
from vitscope.runtime.errors import CheckpointError, ConfigError

#: types of the keys of an analysis that are not options of its measure
PROBE_TYPES = typing.get_type_hints(ProbeOptions)

WHEN_TYPES = typing.get_type_hints(MeasurementTimes)

#: keys of the training images that a run supplies to an analysis
TRAINING_KEYS = ("n_images", "batch_size", "seed")

#: word in their place: none, so that the measure divides its own images
CROSS_VALIDATION = "cross_validation"


def check_analyses(nodes: Mapping[str, Any]) -> None:
    """Check the analyses of a configuration.

    Args:
        nodes: The node ``analysis``, resolved: keys and options by the name of the analysis.

    Raises:
        ConfigError: An unknown key, a value of another type or out of range, or a measure that cannot be resolved.
        CheckpointError: A checkpoint that an analysis names is not there.
    """
    for name, node in nodes.items():
        path = f"analysis.{name}"
        check_node(path, node, extra=(*NODE_KEYS, *_paths_of(path, node)), supplied=_supplied)
        _check_saved(path, node)
        _check_options(path, node)
        _check_part(f"{path}.probe", node.get("probe"), PROBE_TYPES)
        _check_part(f"{path}.when", node.get("when"), WHEN_TYPES)
        _check_training_images(path, node.get("train"))
        recipe = (node.get("probe") or {}).get("augment")
        if isinstance(recipe, str) and recipe not in loading.options("objective"):
            reason = errors.nearest(recipe, ["true", "false", *loading.options("objective")])
            raise ConfigError(f"{path}.probe.augment", recipe, "neither true, false nor an objective", reason)
        if node.get("on_error", "warn") not in ("warn", "raise"):
            raise ConfigError(f"{path}.on_error", node["on_error"], "unknown", "choose warn or raise")


def _check_part(path: str, part: Any, types: Mapping[str, Any]) -> None:
    """Check ``probe`` or ``when`` of an analysis: keys and the types of their values.

    Raises:
        ConfigError: An unknown key, or a value of another type.
    """
    if not isinstance(part, Mapping | None):
        raise ConfigError(path, shown(part), "not a group of keys", f"set {', '.join(types)}")
    for key, value in (part or {}).items():
        if key not in types:
            raise ConfigError(f"{path}.{key}", shown(value), "no such key", errors.nearest(key, types))
        if key in ("every_n_steps", "at_steps"):
            _check_steps(path, key, value)
        if not fits(value, types[key]):
            expected = type_text(types[key])
            raise ConfigError(
                f"{path}.{key}", shown(value), f"not of type {expected}", f"give {type_text(types[key], words=True)}"
            )


def _supplied(measure: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments of a measure that its run supplies."""
    from vitscope.core.run_inputs import run_inputs  # imports torch

    return ("probe", *run_inputs(measure))


def _check_steps(path: str, key: str, value: Any) -> None:
    """Check the optimizer steps after which an analysis measures.

    Raises:
        ConfigError: Other than a whole number or, for ``at_steps``, a list of them counted from 1.
    """
    place = f"{path}.{key}"
    if key == "every_n_steps":
        if not fits(value, int | None):
            raise ConfigError(place, shown(value), "not a whole number of optimizer steps", "set 10, or 0 for none")
        return
    if value is not None and not (isinstance(value, list) and all(fits(step, int) for step in value)):
        written = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else value
        raise ConfigError(place, written, "not a list of whole numbers of optimizer steps", "set [100, 1000]")
    if value and min(value) < 1:
        reason = "steps are counted from 1: the network before its first step is measured by start"
        raise ConfigError(
            place, f"[{', '.join(map(str, value))}]", reason, f"set {path}.start=true, and steps such as [1]"
        )


def _check_training_images(path: str, images: Any) -> None:
    """Check the option ``train`` of an analysis: which training images the run supplies.

    Raises:
        ConfigError: An unknown key or word, or a value of another type.
    """
    if images is None or images == CROSS_VALIDATION:
        return
    if not isinstance(images, Mapping):
        fix = f"set {', '.join(TRAINING_KEYS)}, or {CROSS_VALIDATION}"
        raise ConfigError(f"{path}.train", shown(images), "not a group of keys", fix)
    for key, value in images.items():
        if key not in TRAINING_KEYS:
            raise ConfigError(f"{path}.train.{key}", shown(value), "no such key", errors.nearest(key, TRAINING_KEYS))
        if not fits(value, PROBE_TYPES[key]):
            raise ConfigError(f"{path}.train.{key}", shown(value), "not a whole number", "set 4096")


def _paths_of(path: str, node: Any) -> tuple[str, ...]:
    """Return the keys that hold paths where the measure takes what is read from them."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return ()
    measure = target_allowlist.resolve(node["_target_"], path)
    return ("checkpoints",) if "checkpoints" in inspect.signature(measure).parameters else ()


def _check_options(path: str, node: Mapping[str, Any]) -> None:
    """Refuse options that the measure will refuse whatever the network and the images are, before a training that ends in it.

    Raises:
        ConfigError: With the measure's own words.
    """
    measure = target_allowlist.resolve(node["_target_"], path)
    options = {key: value for key, value in node.items() if key in inspect.signature(measure).parameters}
    try:
        check_options(measure, options)
    except ValueError as error:
        key, value = instantiate.refused_argument(str(error), node, path)
        raise ConfigError(
            key, shown(value), str(error).rstrip("."), f"see the arguments of {node['_target_']}"
        ) from error


def _check_saved(path: str, node: Mapping[str, Any]) -> None:
    """Refuse files of other runs that are not there, before a training that would be the first to miss them."""
    vectors = node.get("eigenvectors")
    result = "name a saved result that holds them (analysis=[hessian_eigenvalues] analysis.hessian_eigenvalues.eigenvectors=true)"
    if isinstance(vectors, str) and not Path(vectors).is_file():
        raise ConfigError(f"{path}.eigenvectors", vectors, "no such file", result)
    if node.get("directions") == "eigenvectors" and not vectors:
        raise ConfigError(f"{path}.eigenvectors", None, "directions=eigenvectors needs them", result)
    named = node.get("checkpoints")
    if named is not None and not (isinstance(named, list) and named and all(isinstance(n, str) for n in named)):
        raise ConfigError(
            f"{path}.checkpoints", shown(named), "not a list of paths", "name run folders or checkpoint files"
        )
    for file in map(Path, named or ()):
        if not (file.is_file() or (file / "checkpoints" / "last.ckpt").is_file()):
            raise CheckpointError(
                f"{path}.checkpoints", file, "no checkpoint there", "name run folders or checkpoint files"
            )
