"""The composed configuration: where it lives, what it may name, its hash, and the upper bounds of `caps`.

Checks of values are in `validation.py`, what a ``_target_`` may name is in `target_allowlist.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

#: a path that Hydra's grammar takes without quotes
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_/.@+-]+")


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


def typed_value(text: str) -> Any:
    """Return the value of a text of the command line: a number, true, false, null, a list or a mapping, else the text itself.

    Lists and mappings are written as ``[...]`` and ``{...}``. A time such as ``12:30`` stays a text; for YAML 1.1 it is a number
    to the base of 60.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if text.lstrip().startswith(("[", "{")) or value is None or isinstance(value, bool):
        return value
    return value if isinstance(value, int | float) and ":" not in text else text


def path_override(key: str, path: Path) -> str:
    """Return ``key=path`` as Hydra reads it: in quotes where the path holds what its grammar refuses in a plain value (é, =)."""
    text = str(path)
    if _PLAIN_PATH.fullmatch(text):
        return f"{key}={text}"
    quoted = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), text)
    return f"{key}='{quoted}'"


def drop_unchosen(cfg: DictConfig) -> list[str]:
    """Take what an experiment sets for diagnostics that were not chosen out of ``cfg.analysis``; return their names."""
    nodes = cfg.get("analysis") or {}
    names = options("analysis")
    unchosen = [
        str(name)
        for name in nodes
        if name in names and OmegaConf.is_dict(nodes[name]) and "_target_" not in nodes[name]
    ]
    with open_dict(cfg):
        for name in unchosen:
            del nodes[name]
    return unchosen


#: the loss of a configuration that does not name one
DEFAULT_LOSS = "cross_entropy"


def without_default_loss(objective: Any) -> Any:
    """Return a plain objective without its loss where that is the default: those of earlier runs lack the key."""
    if not isinstance(objective, dict):
        return objective
    return {key: value for key, value in objective.items() if key != "loss" or value != DEFAULT_LOSS}


#: keys of the data node that are not arguments of the data module
DATA_HINTS = ("recipe",)

#: keys of the model node that are not arguments of the model's function
MODEL_HINTS = ("capabilities", "structure")

#: keys of an analysis node that are not options of its measure
NODE_KEYS = ("_target_", "probe", "when", "on_error")

PROBE_KEYS = ("split", "augment", "n_images", "batch_size", "seed", "mix")

WHEN_KEYS = ("start", "every_n_epochs", "every_n_steps", "at_steps", "end")
