"""Differences of a run's configuration from the defaults of the groups that its command line chose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from vitscope.config import hydra_internals, loading
from vitscope.config.experiment_identity import EXPERIMENT_KEYS, flattened

#: parts of a configuration that are compared: what defines a run, what it measures, and where its weights come from
COMPARED = (*EXPERIMENT_KEYS, "seed", "analysis", "ckpt_path")


def group_choices(arguments: Iterable[str]) -> list[str]:
    """Return the arguments of a recorded command line that choose existing options of groups, such as ``model=vit``."""
    choices = []
    for argument in map(str, arguments):
        match = re.fullmatch(r"\+{0,2}([a-z_]+)=\[?([\w,. -]+)\]?", argument)
        if match and set(filter(None, re.split(r"[, ]+", match[2]))) <= set(loading.options(match[1])):
            choices.append(argument)
    return choices


def differences(cfg: Mapping[str, Any], command: str, choices: Iterable[str]) -> dict[str, Any] | None:
    """Return the values of a run that differ from what its command composes from the chosen groups alone.

    Args:
        cfg: The run's configuration as plain containers.
        command: ``train`` or ``analyze``.
        choices: Arguments that choose groups, see `group_choices`.

    Returns:
        By dotted key; None where this version cannot compose these choices.
    """
    from hydra import compose
    from hydra.errors import HydraException

    name = "analyze" if command == "analyze" else "train"
    try:
        with hydra_internals.composing_from(str(loading.folder()), name):
            composed = loading.plain(compose(name, overrides=list(choices)))
    except (HydraException, OmegaConfBaseException):
        return None
    default = flattened({key: composed.get(key) for key in COMPARED})
    values = flattened({key: cfg.get(key) for key in COMPARED})
    return {key: value for key, value in values.items() if key not in default or default[key] != value}
