"""Overrides of a run's configuration: which arguments of a command line Hydra composes, and which apply to the run's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import hydra_internals, loading
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

#: groups that `analyze` takes from a run
RUN_GROUPS = ("model", "data", "objective", "optimizer")


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
        ConfigError: A key that the configuration does not have (without ``+``), a group chosen anew, several values, a
            removal or an option of Hydra's: what is written down in a run's folder is not composed again.
    """
    for argument in arguments:
        if argument.startswith("-"):
            raise ConfigError(argument, None, "a Hydra option; with run= the saved configuration is used",
                              "leave it out, or leave out run=")  # fmt: skip
    for override in hydra_internals.parse_overrides(arguments):
        key, value = override.key_or_group, _value(override)
        node = OmegaConf.select(cfg, key, default=None)
        if node is None and not _has(cfg, key) and not override.is_add() and not override.is_force_add():
            parent, _, name = key.rpartition(".")
            above = OmegaConf.select(cfg, parent) if parent else cfg
            names = list(above.keys()) if isinstance(above, DictConfig) else []
            raise ConfigError(key, value, "no such key", errors.nearest(name, map(str, names)))
        if isinstance(node, DictConfig) and loading.options(key):
            raise ConfigError(
                key, value, "the groups of an existing run cannot be changed", "start a new run to choose another one"
            )
        try:
            OmegaConf.update(cfg, key, value, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(key, value, str(error).splitlines()[0], "correct the override") from None


def _value(override: hydra_internals.Override) -> Any:
    if override.is_delete():
        raise ConfigError(
            override.key_or_group,
            None,
            "keys of an existing run cannot be removed",
            "set it to another value, such as null",
        )
    if override.is_sweep_override():
        raise ConfigError(override.key_or_group, override.get_value_string(), "several values", "give one value")
    return override.value()


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node
