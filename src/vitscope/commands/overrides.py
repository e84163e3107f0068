"""Command lines that start from a run: which overrides Hydra composes, and which apply to the run's own values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitscope import config
from vitscope.errors import ConfigError

T = TypeVar("T")

_errors: list[BaseException] = []


def kept_error(task: Callable[[DictConfig], T]) -> Callable[[DictConfig], T | None]:
    """Keep a task's error for `uncaught`: Hydra would print text of its own on top of our one line."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> T | None:
        try:
            return task(cfg)
        except BaseException as error:
            _errors.append(error)
            return None

    return guarded


def uncaught(composed: Callable[[], object]) -> None:
    """Run a Hydra command and raise what its task raised."""
    _errors.clear()
    composed()
    if _errors:
        raise _errors.pop()


def value_of(argv: Sequence[str], key: str) -> str | None:
    """Return the value of ``key=value`` in a command line, or None."""
    for argument in argv:
        if argument.startswith(f"{key}="):
            value = argument.partition("=")[2].strip("'\"")
            return None if value in ("", "null") else value
    return None


def split(argv: Sequence[str], groups: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line's arguments as ``(for Hydra, dotted overrides inside the named groups)``."""
    inside = [
        a for a in argv if "=" in a and a.lstrip("+~").split("=")[0].split(".")[0] in groups and "." in a.split("=")[0]
    ]
    return [a for a in argv if a not in inside], inside


def apply(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Apply ``key=value`` overrides to a composed configuration, in place.

    Raises:
        ConfigError: a key that the configuration does not have (without ``+``).
    """
    for override in _parsed(arguments):
        key = override.key_or_group
        known = OmegaConf.select(cfg, key, default=None) is not None or _has(cfg, key)
        if not known and not override.is_add() and not override.is_force_add():
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(cfg, parent) if parent else cfg
            names = list(node.keys()) if isinstance(node, DictConfig) else []
            raise ConfigError(key, override.value(), "no such key", config.nearest(name, map(str, names)))
        try:
            OmegaConf.update(cfg, key, override.value(), force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(key, override.value(), str(error).splitlines()[0], "correct the override") from None


def _parsed(arguments: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(arguments))


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node
