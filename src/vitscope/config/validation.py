"""`validate(cfg)`: refuse what cannot work, before data, model or W&B start, in one line that names the key.

Keys, types and ranges are checked against the signatures of what the nodes configure, so that a new model or measure brings
its own checks; only relations between keys are written out, here and in `cross_checks`.
"""

from __future__ import annotations

import copy
import functools
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import cross_checks, instantiate, loading, target_allowlist
from vitscope.config.keys.analysis_keys import check_analyses
from vitscope.config.keys.common_probe import checked_probe
from vitscope.config.keys.logger_choice import PACKAGES, check_loggers, without_loggers
from vitscope.config.keys.run_words import check_run_words
from vitscope.config.loading import DATA_HINTS, MODEL_HINTS
from vitscope.config.loss import loss_choice
from vitscope.config.ranges.number_checks import check_numbers
from vitscope.config.signature_checks import check_arguments, check_node, fits, shown
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError, DataError, StorageError

METRICS = cross_checks.METRICS


def validate(cfg: DictConfig) -> None:
    """Check a composed configuration.

    Raises:
        ConfigError: Naming the key, its value, why it cannot work and what to do.
        DataError: ``data.root`` cannot be used.
        StorageError: ``paths.runs`` cannot be written.
    """
    tree = cross_checks.with_known_counts(_resolved(cfg))
    for place, node in instantiate.targets(tree):  # before anything looks at arguments
        target_allowlist.check_target(node, place)
    _check_plain_values(tree, whole=bool(OmegaConf.is_struct(cfg)))  # a run's own file may be older than a key
    for group in ("model", "data", "optimizer", "trainer"):
        if group in tree:
            _check_target_group(group, tree[group])
    _check_l2_form(tree.get("objective") or {})
    loss_choice.check(tree.get("objective") or {})
    _check_caps(tree.get("caps") or {})
    check_analyses(tree.get("analysis") or {})
    for name, node in (tree.get("callbacks") or {}).items():
        check_node(f"callbacks.{name}", node, extra=("_package_",))
    cross_checks.check(tree)
    _check_paths(tree)


def validate_plain_values(cfg: DictConfig) -> None:
    """Check what needs no library of models: keys outside of nodes with a ``_target_``, their types, and ranges of numbers.

    A command calls this before it imports what `validate` needs, so that a slip is refused without waiting for torch.

    Args:
        cfg: A composed configuration; it is not changed.

    Raises:
        ConfigError: Naming the key, its value, why it cannot work and what to do.
    """
    cfg = copy.deepcopy(cfg)
    loading.drop_unchosen(cfg)
    _check_plain_values(cross_checks.with_known_counts(_resolved(cfg)), whole=bool(OmegaConf.is_struct(cfg)))


def _check_plain_values(tree: Mapping[str, Any], *, whole: bool) -> None:
    check_numbers(tree)
    check_run_words(tree)
    _check_roots(tree, whole=whole)
    checked_probe(tree.get("probe") or {})
    check_loggers(tree.get("logger"), {name: _file("logger", name) for name in PACKAGES})
    for group in ("objective", "logger", "paths"):
        node = dict(tree.get(group) or {})
        node = without_loggers(node) if group == "logger" else node
        if isinstance(node.get("loss"), Mapping):  # of the user's own, see `vitscope.config.loss.loss_choice`
            del node["loss"]
        _check_plain_group(group, node)


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(missing[0], "???", "a value is required", f"set {missing[0]}=...")
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(key, None, str(error).splitlines()[0], "correct the interpolation") from None


def _check_roots(tree: Mapping[str, Any], *, whole: bool) -> None:
    """Check the keys outside groups, and that every group is there and is one."""
    is_analysis = bool({"device", "reuse"} & set(tree))
    groups, keys = _roots("analyze" if is_analysis else "train")
    needed = groups - {"profile", "experiment", "caps", "logger", "probe"}
    if is_analysis:
        needed -= {"trainer"}
    groups = groups | {"optimizer"}  # analyze.py takes it over from the run
    for key, value in tree.items():
        if key not in keys and key not in groups:
            raise ConfigError(key, shown(value), "no such key", errors.nearest(str(key), groups | set(keys)))
        if key in groups and not isinstance(value, Mapping | None):
            raise ConfigError(key, shown(value), "not a group", f"choose one of {', '.join(loading.options(key))}")
        if key in keys and not any(fits(value, kind) for kind in keys[key]):
            raise ConfigError(key, shown(value), f"not {_named(keys[key])}", f"give {_named(keys[key])}")
    missing_keys = sorted(set(keys) - set(tree))
    if whole and missing_keys:
        raise ConfigError(missing_keys[0], None, "is missing", f"leave out ~{missing_keys[0]}")
    for group in sorted(needed - {key for key, value in tree.items() if isinstance(value, Mapping)}):
        raise ConfigError(group, None, "is missing", f"choose one of {', '.join(loading.options(group))}")


@functools.cache
def _roots(root: str) -> tuple[set[str], dict[str, set[Any]]]:
    """Return the groups of ``train`` or ``analyze``, and their other keys with the types these take."""
    content: Any = OmegaConf.to_container(OmegaConf.load(loading.folder() / f"{root}.yaml"))
    named = {str(name) for entry in content.pop("defaults") if isinstance(entry, Mapping) for name in entry}
    groups = {name for name in named if not name.startswith("override ")}
    groups |= {str(key) for key, value in content.items() if isinstance(value, Mapping) and key != "hydra"}
    return groups, {str(key): _kinds(value) for key, value in content.items() if key not in groups and key != "hydra"}


def _kinds(value: Any) -> set[Any]:
    """Return the types that may replace a value of a configuration file; null stands for a text that is not given."""
    if isinstance(value, bool):
        return {bool}
    if isinstance(value, int | float):
        return {float} if isinstance(value, float) else {int}
    if isinstance(value, list):
        return {list[str]}
    return {str, type(None)} if value is None else {str}


def _named(kinds: set[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    return " or ".join(sorted(names.get(kind, "a list of texts") for kind in kinds))


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node


def _check_target_group(group: str, node: Mapping[str, Any]) -> None:
    extra = {"data": DATA_HINTS, "model": MODEL_HINTS, "optimizer": ("schedule",)}.get(group, ())
    check_node(group, node, extra=extra)
    if group == "model" and "capabilities" in node:
        _check_capabilities(node["capabilities"])
    if group == "data" and isinstance(node.get("recipe"), Mapping):
        recipe_keys = {key for name in loading.options("data") for key in _file("data", name).get("recipe", {})}
        for key in node["recipe"]:
            if key not in recipe_keys:
                raise ConfigError(
                    f"data.recipe.{key}", shown(node["recipe"][key]), "no such key", errors.nearest(key, recipe_keys)
                )
    if group == "optimizer" and node.get("schedule"):
        from vitscope.core.lr_schedule import factor

        check_arguments(
            "optimizer.schedule", node["schedule"], factor, supplied=("step", "steps_per_epoch", "total_epochs")
        )


def _check_capabilities(stated: Any) -> None:
    from vitscope.models.structure.capabilities import ModelCapabilities  # imports torch

    if not isinstance(stated, Mapping):
        raise ConfigError(
            "model.capabilities", shown(stated), "not a group of keys", "set model.capabilities.residual_units=false"
        )
    check_arguments("model.capabilities", stated, ModelCapabilities)


def _check_plain_group(group: str, node: Mapping[str, Any]) -> None:
    allowed_values: dict[str, set[Any]] = {}
    for name in set(loading.options(group)) - (set(PACKAGES) if group == "logger" else set()):
        for key, value in _file(group, name).items():
            kinds = _kinds(value)  # a bound, or a number that another file gives with a fraction
            allowed_values.setdefault(key, set()).update(kinds if kinds != {int} else {float})
    for key, value in node.items():
        if key not in allowed_values:
            raise ConfigError(f"{group}.{key}", shown(value), "no such key", errors.nearest(str(key), allowed_values))
        if not any(fits(value, kind) for kind in allowed_values[key]):
            expected = _named(allowed_values[key])
            raise ConfigError(f"{group}.{key}", shown(value), f"not {expected}", f"give {expected}")


def _check_l2_form(objective: Mapping[str, Any]) -> None:
    from vitscope.core.objective import L2_FORMS  # imports torch

    form = objective.get("l2")
    if form not in L2_FORMS:
        raise ConfigError("objective.l2", form, "unknown form", errors.nearest(str(form), L2_FORMS))


def _check_caps(caps: Mapping[str, Any]) -> None:
    """Refuse bounds of what there is not: each is the name of a size in some file of ``conf/analysis``, or the trainer's."""
    for name in caps:
        if name not in _bounded():
            raise ConfigError(f"caps.{name}", shown(caps[name]), "no such key", errors.nearest(str(name), _bounded()))


@functools.cache
def _bounded() -> set[str]:
    files = [_file("analysis", name) for name in loading.options("analysis")] + [_file("caps", "smoke")]
    keys = [key for file in files for key, _ in _leaves(file)]
    # radii.0 is the first of a list named radii
    return {[part for part in key.split(".") if not part.isdigit()][-1] for key in keys}


def _file(group: str, name: str) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(loading.folder() / group / f"{name}.yaml"))
    return {key: value for key, value in typing.cast(dict[str, Any], loaded).items() if key != "defaults"}


def _check_paths(tree: Mapping[str, Any]) -> None:
    paths = tree["paths"]
    if not paths.get("runs"):
        raise ConfigError("paths.runs", paths.get("runs"), "no folder", "set paths.runs=runs")
    if not writable(Path(paths["runs"])):
        raise StorageError("paths.runs", paths["runs"], "not writable", "choose a folder that is")
    root = (tree.get("data") or {}).get("root")
    if root and Path(root).exists() and not os.access(root, os.R_OK | os.X_OK):
        raise DataError("data.root", root, "not readable", "choose a folder that is")


def writable(path: Path) -> bool:
    """Tell whether files can be made in a folder, or the folder itself where it is not there yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
