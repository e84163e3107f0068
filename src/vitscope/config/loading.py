"""The composed configuration: where it lives, what it may name, its hash, and the upper bounds of `caps`.

Checks of values are in `validation.py`, what a ``_target_`` may name is in `trust.py`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vitscope.config.target_allowlist import PACKAGES, check_role, check_target, resolve
from vitscope.runtime.errors import ConfigError, nearest

__all__ = [
    "PACKAGES", "RESERVED", "apply_caps", "check_role", "check_target", "config_hash", "digest", "folder", "instantiate",
    "nearest", "options", "plain", "refused", "resolve", "targets",
]  # fmt: skip

#: what decides whether two runs are the same experiment
IDENTITY = ("model", "data", "objective", "optimizer", "trainer", "callbacks", "compile", "seed")

#: keys of a node that are ours and not an argument of its `_target_`
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


def folder() -> Path:
    """Return the folder of configuration files: the checkout's, else the one inside the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "train.yaml").is_file() else package / "conf"


def options(group: str) -> list[str]:
    """Return the names that ``group=<name>`` accepts."""
    return sorted(file.stem for file in (folder() / group).glob("*.yaml"))


def plain(node: Any) -> Any:
    """Return a resolved copy of a node as plain dicts and lists."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else copy.deepcopy(node)


def digest(value: Any, length: int = 8) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a plain value's canonical JSON."""
    text = json.dumps(plain(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def config_hash(cfg: DictConfig) -> str:
    """Return the hash (16 digits) of what makes a run the experiment that it is; folders and logging left out."""
    resolved = plain(cfg)
    identity = {key: resolved.get(key) for key in IDENTITY}
    if resolved.get("channels_last"):  # changes the order of sums; a run without it keeps the hash it always had
        identity["channels_last"] = True
    if isinstance(identity["data"], dict):
        identity["data"] = {k: v for k, v in identity["data"].items() if k not in ("root", "num_workers")}
    if isinstance(identity["trainer"], dict):
        incidental = ("default_root_dir", "enable_progress_bar", "enable_model_summary", "profiler", "logger")
        identity["trainer"] = {k: v for k, v in identity["trainer"].items() if k not in incidental}
    return digest(identity, 16)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``(dotted path, node)`` of every mapping with a ``_target_`` in a plain tree, outer ones first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def instantiate(node: Any, path: str, *, drop: Iterable[str] = (), **arguments: Any) -> Any:
    """Call what a node's ``_target_`` names with the node's keys, after checking every target in the tree.

    Args:
        node: a mapping with ``_target_``; nested ones are built first.
        path: its dotted place in the configuration, for errors.
        drop: keys that are not arguments.
        arguments: passed on top of the node's.

    Raises:
        ConfigError: a target that is not meant to be configured, or arguments that it refuses.
    """
    tree = plain(node)
    for place, inner in targets(tree, path):
        check_target(inner, place)
    return _build({k: v for k, v in tree.items() if k not in set(drop)}, path, arguments)


def _build(node: Any, path: str, arguments: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, f"{path}.{index}", {}) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    keywords = {k: _build(v, f"{path}.{k}", {}) for k, v in node.items() if k not in RESERVED}
    if "_target_" not in node:
        return keywords
    target = resolve(node["_target_"], path)
    keywords.update(arguments)
    if node.get("_partial_", False):
        return functools.partial(target, **keywords)
    try:
        return target(**keywords)
    except Exception as error:
        if not refused(error):
            raise
        raise ConfigError(path, None, str(error).rstrip("."), f"see the arguments of {node['_target_']}") from error


def refused(error: Exception) -> bool:
    """Tell whether a callee refused its arguments, which is the user's to mend: such errors are raised on purpose there."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, ValueError | MisconfigurationException) or (
        isinstance(error, TypeError) and "argument" in str(error)
    )


def drop_unchosen(cfg: DictConfig) -> list[str]:
    """Take what an experiment sets for diagnostics that were not chosen out of ``cfg.analysis``; return their names."""
    nodes = cfg.get("analysis") or {}
    known = options("analysis")
    unchosen = [
        str(name)
        for name in nodes
        if name in known and OmegaConf.is_dict(nodes[name]) and "_target_" not in nodes[name]
    ]
    with open_dict(cfg):
        for name in unchosen:
            del nodes[name]
    return unchosen


def apply_caps(cfg: DictConfig) -> None:
    """Lower the sizes of a composed configuration to the upper bounds in ``cfg.caps``; nothing is added or raised.

    ``epochs``, ``steps`` (an epoch) and ``eval_batches`` bound the trainer; every other name bounds the key of that
    name wherever it stands in ``analysis``; a list of numbers keeps those up to the bound.

    Raises:
        ConfigError: a bound that is none.
    """
    caps = {name: bound for name, bound in dict(cfg.get("caps") or {}).items() if bound is not None}
    for name, bound in caps.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < float("inf"):
            raise ConfigError(f"caps.{name}", bound, "not a positive number", "give one, or null for no bound")
    trainer = cfg.get("trainer") or {}
    bound = caps.pop("epochs", None)
    if bound is not None and "max_epochs" in trainer:
        value = trainer["max_epochs"]
        if value is None or (isinstance(value, int) and (value == -1 or value > bound)):  # other kinds validate refuses
            trainer["max_epochs"] = bound
    # steps an epoch rather than in all: an epoch that max_steps cuts short would not be validated
    limits = {"steps": ("limit_train_batches",), "eval_batches": ("limit_val_batches", "limit_test_batches")}
    for cap, keys in limits.items():
        bound = caps.pop(cap, None)
        if bound is None:
            continue
        for key in keys:
            if key in trainer and _exceeds(trainer[key], bound):
                trainer[key] = bound
    if cfg.get("analysis"):
        _cap(cfg.analysis, caps)


def apply_analysis_caps(cfg: DictConfig) -> None:
    """Lower the sizes in ``cfg.analysis`` alone to the upper bounds in ``cfg.caps``.

    Raises:
        ConfigError: a bound that is none.
    """
    trainer = cfg.get("trainer")
    kept = copy.deepcopy(trainer)
    apply_caps(cfg)
    if kept is not None:
        cfg.trainer = kept


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
