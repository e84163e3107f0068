"""Allow-list of the objects that a ``_target_`` of a configuration may name.

A configuration can come from a stranger together with a checkpoint, so that only what is meant to be configured is called;
the resolved object is judged, not its spelling.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from vitscope.config import weight_files
from vitscope.runtime import trusted_packages
from vitscope.runtime.errors import ConfigError, first_line, nearest

#: packages from which a `_target_` may come, before its kind is judged
PACKAGES = ("vitscope", "torch.nn", "torch.optim", "torchvision", "timm", "torchmetrics", "pytorch_lightning")

#: parts of those packages whose classes load networks, files or data sets by themselves
_LOADERS = ("timm.task", "timm.utils", "timm.data", "timm.scheduler", "torchvision.datasets", "torchvision.io",
            "torchmetrics.audio", "torchmetrics.functional", "torchmetrics.image", "torchmetrics.multimodal",
            "torchmetrics.text", "torchmetrics.video", "pytorch_lightning.demos")  # fmt: skip


def check_target(node: Mapping[str, Any], path: str) -> Callable[..., Any]:
    """Return what a node's ``_target_`` names, if it may be configured and is given no file to unpickle.

    Raises:
        ConfigError: Naming the target or the argument.
    """
    target = resolve(node["_target_"], path)
    if not _trusted(target):
        weight_files.check(node, path, getattr(target, "__module__", None) or "")
    return target


def check_role(node: Mapping[str, Any], path: str) -> None:
    """Refuse a target that may be configured, but not in this place: an optimizer for a callback, a model for a data set.

    Raises:
        ConfigError: Naming the target and what belongs there.
    """
    import pytorch_lightning as pl
    import torch

    from vitscope.data import DataModule

    place = re.sub(r"^(callbacks|analysis)\.[^.]+$", r"\1", path)
    roles = {
        "model": (torch.nn.Module, ("vitscope.models.", "timm.", "torchvision."), "a model", "vitscope.models.vit"),
        "data": (DataModule, (), "the data module", "vitscope.data.DataModule"),
        "data.source": ((), ("vitscope.data.",), "a loader", "vitscope.data.sources.folder.load"),
        "optimizer": (torch.optim.Optimizer, (), "an optimizer", "torch.optim.AdamW"),
        "trainer": (pl.Trainer, (), "a trainer", "pytorch_lightning.Trainer"),
        "callbacks": (pl.Callback, (), "a callback", "pytorch_lightning.callbacks.EarlyStopping"),
        "analysis": ((), ("vitscope.diagnostics.",), "a measure", "vitscope.hessian_trace"),
        "objective.loss": (torch.nn.modules.loss._Loss, (), "a loss", "torch.nn.HuberLoss"),
    }
    if place not in roles:
        return
    kind, modules, expectation, example = roles[place]
    target = resolve(node["_target_"], path)
    fits = issubclass(target, kind) if inspect.isclass(target) else target.__module__.startswith(modules)
    if not fits and not _trusted(target):
        raise ConfigError(f"{path}._target_", node["_target_"], f"not {expectation}", f"set {path}._target_={example}")


def resolve(target: Any, path: str) -> Callable[..., Any]:
    """Return the object that a dotted ``_target_`` names, if it is meant to be configured.

    Raises:
        ConfigError: Unknown, or not a model, optimizer, data set, metric, callback, logger or measure.
    """
    key = f"{path}._target_"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(key, target, "not a dotted name", "name a callable such as vitscope.models.vit")
    trusted = trusted_packages.packages()
    top = target.partition(".")[0]
    if top not in {p.partition(".")[0] for p in PACKAGES} | trusted:
        raise ConfigError(key, target, "its package is not trusted", f"set VITSCOPE_TRUST={top} if it is your own")
    located = _locate(target, key)
    module = getattr(located, "__module__", None) or ""
    if not callable(located) or inspect.ismodule(located):
        raise ConfigError(key, target, f"a {type(located).__name__}, not a callable", "name a class or a function")
    if _trusted(located) or _configurable(located, module):
        return located
    raise ConfigError(key, target, f"{module}.{getattr(located, '__qualname__', '?')} is not meant to be configured",
                      "name a model, optimizer, data set, metric, callback or measure")  # fmt: skip


def _trusted(target: Any) -> bool:
    return trusted_packages.is_trusted(getattr(target, "__module__", None) or "")


def _locate(target: str, key: str) -> Any:
    parts = target.split(".")
    try:
        located: Any = importlib.import_module(parts[0])
        for index, part in enumerate(parts[1:], start=2):
            if part.startswith("_"):
                raise ConfigError(key, target, "a private name", "name something public")
            if not hasattr(located, part):
                importlib.import_module(".".join(parts[:index]))
            located = getattr(located, part)
    except ConfigError:
        raise
    except Exception as error:
        # modules that make their attributes when asked (torch.ops, torch.classes) raise anything
        raise _not_located(parts, key, error) from error
    return located


def _not_located(parts: list[str], key: str, error: Exception) -> ConfigError:
    """Return the error of a name that was not reached: it is none, or the user's own package raised while it was imported."""
    target = ".".join(parts)
    missing_module = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing_module == parts[0]:
        return ConfigError(
            key, target, f"Python finds no package {parts[0]}", "install it, or set PYTHONPATH to the folder it is in"
        )
    is_absent = missing_module is not None and f"{target}.".startswith(f"{missing_module}.")
    if is_absent or not trusted_packages.is_trusted(target) or _is_attribute_missing(error):
        return ConfigError(key, target, "no such name", _suggest(parts))
    place = trusted_packages.place_of(error)
    problem = f"{type(error).__name__}: {first_line(error)}" + (f" ({place})" if place else "")
    return ConfigError(key, target, f"importing it raised {problem}", "correct that module, or install what it imports")


def _is_attribute_missing(error: Exception) -> bool:
    """Tell whether an error is that of `getattr` here, not one that a module raised while it was imported."""
    return isinstance(error, AttributeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None


def _suggest(parts: list[str]) -> str:
    try:
        parent = importlib.import_module(".".join(parts[:-1]))
    except Exception:
        return "check the spelling"
    return nearest(parts[-1], (name for name in dir(parent) if not name.startswith("_")))


def _configurable(target: Any, module: str) -> bool:
    if not any(module == package or module.startswith(f"{package}.") for package in PACKAGES):
        return False
    if any(module == part or module.startswith(f"{part}.") for part in _LOADERS):
        return False
    name = getattr(target, "__qualname__", "_")
    if "." in name or name.startswith("_"):
        return False
    if inspect.isclass(target):
        return issubclass(target, _bases())
    if not inspect.isfunction(target):
        return False
    import timm
    import torchvision

    if module.startswith("vitscope."):
        return _ours(target, module, name)
    if module.startswith("timm.models."):
        return timm.is_model(name)
    return module.startswith("torchvision.models.") and name in torchvision.models.list_models()


def _ours(target: Any, module: str, name: str) -> bool:
    """Tell whether a function of this package is a model, the loader of a data set or a measure."""
    import vitscope
    from vitscope import models

    if module.startswith("vitscope.models."):
        return models.functions().get(name) == module and name != "load_official_state_dict"
    if module.startswith("vitscope.data."):
        return name == "load" or (module, name) == ("vitscope.data.sources.photos", "whole")
    return vitscope.measures().get(name) == module


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
