"""The composed configuration: where it lives, what it may name, its hash, and the upper bounds of `caps`.

Checks of values are in `validation.py`. A configuration can come from a stranger together with a checkpoint, so that a
``_target_`` may only name what is meant to be configured; the resolved object is judged, not its spelling.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vitscope.errors import ConfigError

#: packages from which a `_target_` may come, before its kind is judged
PACKAGES = ("vitscope", "torch.nn", "torch.optim", "torchvision", "timm", "torchmetrics", "pytorch_lightning")

#: what decides whether two runs are the same experiment
IDENTITY = ("model", "data", "objective", "optimizer", "trainer", "callbacks", "compile", "seed")

#: keys of a node that are ours and not an argument of its `_target_`
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


def folder() -> Path:
    """Return the folder of configuration files: the checkout's, else the one inside the installed package."""
    package = Path(__file__).parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "train.yaml").is_file() else package / "conf"


def options(group: str) -> list[str]:
    """Return the names that ``group=<name>`` accepts."""
    return sorted(file.stem for file in (folder() / group).glob("*.yaml"))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a few words that lead from a wrong name to the right ones."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names[:40])}"


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
        resolve(inner["_target_"], place)
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
    except (TypeError, ValueError) as error:
        if not _raised_at_call(error):
            raise
        raise ConfigError(path, None, str(error).rstrip("."), f"see the arguments of {node['_target_']}") from error


def _raised_at_call(error: Exception) -> bool:
    # a refusal by the callee (or by what it delegates to) is the user's to mend; both kinds are raised on purpose there
    return isinstance(error, ValueError) or "argument" in str(error)


def resolve(target: Any, path: str) -> Callable[..., Any]:
    """Return the object that a dotted ``_target_`` names, if it is meant to be configured.

    Raises:
        ConfigError: unknown, or not a model, optimizer, data set, metric, callback, logger or measure.
    """
    key = f"{path}._target_"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(key, target, "not a dotted name", "name a callable such as vitscope.models.vit")
    trusted = {name for name in os.environ.get("VITSCOPE_TRUST", "").split(",") if name}
    top = target.partition(".")[0]
    if top not in {p.partition(".")[0] for p in PACKAGES} | trusted:
        raise ConfigError(key, target, "its package is not trusted", f"set VITSCOPE_TRUST={top} if it is your own")
    found = _locate(target, key)
    module = getattr(found, "__module__", None) or ""
    if not callable(found) or inspect.ismodule(found):
        raise ConfigError(key, target, f"a {type(found).__name__}, not a callable", "name a class or a function")
    if module.partition(".")[0] in trusted or _configurable(found, module):
        return found
    raise ConfigError(key, target, f"{module}.{getattr(found, '__qualname__', '?')} is not meant to be configured",
                      "name a model, optimizer, data set, metric, callback or measure")  # fmt: skip


def _locate(target: str, key: str) -> Any:
    parts = target.split(".")
    try:
        found: Any = importlib.import_module(parts[0])
        for index, part in enumerate(parts[1:], start=2):
            if part.startswith("_"):
                raise ConfigError(key, target, "a private name", "name something public")
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:index]))
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ConfigError(key, target, "no such name", _suggest(parts)) from None
    return found


def _suggest(parts: list[str]) -> str:
    try:
        parent = importlib.import_module(".".join(parts[:-1]))
    except ImportError:
        return "check the spelling"
    return nearest(parts[-1], (name for name in dir(parent) if not name.startswith("_")))


def _configurable(found: Any, module: str) -> bool:
    if not any(module == package or module.startswith(f"{package}.") for package in PACKAGES):
        return False
    name = getattr(found, "__qualname__", "_")
    if "." in name or name.startswith("_"):
        return False
    if inspect.isclass(found):
        return issubclass(found, _bases())
    if not inspect.isfunction(found):
        return False
    import timm
    import torchvision

    if module.startswith("vitscope."):
        return module.startswith(("vitscope.models.", "vitscope.data.", "vitscope.diagnostics."))
    if module.startswith("timm.models."):
        return timm.is_model(name)
    return module.startswith("torchvision.models.") and name in torchvision.models.list_models()


@functools.cache
def _bases() -> tuple[type, ...]:
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.profilers import Profiler
    from pytorch_lightning.strategies import Strategy

    return (
        torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, pl.Callback, pl.LightningDataModule,
        pl.Trainer, Logger, Profiler, Strategy,
    )  # fmt: skip


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
    """
    caps = dict(cfg.get("caps") or {})
    trainer = cfg.get("trainer") or {}
    bound = caps.pop("epochs", None)
    if bound is not None and "max_epochs" in trainer:
        value = trainer["max_epochs"]
        trainer["max_epochs"] = bound if value is None or value < 0 else min(value, bound)
    # steps an epoch rather than in all: an epoch that max_steps cuts short would not be validated
    limits = {"steps": ("limit_train_batches",), "eval_batches": ("limit_val_batches", "limit_test_batches")}
    for cap, keys in limits.items():
        bound = caps.pop(cap, None)
        for key in keys if bound is not None else ():
            if key in trainer and (not isinstance(trainer[key], int) or trainer[key] > bound):
                trainer[key] = bound
    if cfg.get("analysis"):
        _cap(cfg.analysis, caps)


def _cap(node: Any, caps: Mapping[str, Any]) -> None:
    for key in list(node):
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_dict(value):
            _cap(value, caps)
        elif key in caps and isinstance(value, ListConfig):
            node[key] = [v for v in value if v <= caps[key]]
        elif key in caps and (value is None or (isinstance(value, int | float) and value > caps[key])):
            node[key] = caps[key]
