"""Images and objective that all chosen analyses share: the keys ``probe.*``, and the defaults for a checkpoint without a run.

Both are written into the nodes of the analyses before anything is validated or hashed, so that results, their names and their
cards follow from ``analysis.<name>.probe`` and ``objective`` alone. The keys ``probe.*`` are null afterwards, but for
``probe.cache``.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vitscope.config import loading
from vitscope.data.cache_choices import check_choice
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

_logger = logging.getLogger(__name__)

#: keys of ``probe`` at the top of a configuration
COMMON_KEYS = ("split", "n_images", "augment")

#: key of ``probe`` that changes no number and stays where it is: no part of an analysis, of its result's name or its card
CACHE = "cache"

#: ``probe.n_images`` that stands for every image of the split; null leaves each analysis its own number
ALL_IMAGES = "all"

#: measures, keys of their probe that ``probe.*`` leaves as they are, the value that is refused (None: every one), and why
_OWN_IMAGES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "vitscope.shape_bias": (("split",), None, "it needs the images of the split cue_conflict"),
    "vitscope.tap_table": (COMMON_KEYS, None, "it reads shapes from one image"),
    "vitscope.calibration": (("split",), "val", "its temperature is fitted on those images"),
    "vitscope.depth_probes": (("split",), "train", "its classifiers are fitted on those images"),
}


def apply_common_probe(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Set the split, the number and the augmentation of the images of all chosen analyses to those of ``cfg.probe``, in place.

    An analysis for which a value makes no sense keeps its own, and a message says so.

    Args:
        cfg: Composed configuration; ``cfg.probe`` is null afterwards.
        overrides: Overrides of the command line; ``analysis.<name>.probe.<key>`` among them wins.

    Raises:
        ConfigError: A key or a value that no analysis takes.
    """
    common = cfg.get("probe")
    if common is None:
        return
    values = {key: value for key, value in checked_probe(common).items() if value is not None and key != CACHE}
    if not values:
        return
    keys = overridden_keys(overrides)
    for name, node in _analysis_nodes(cfg):
        for key, value in values.items():
            if f"analysis.{name}.probe.{key}" in keys:  # the command line has set it
                continue
            reason = _reason_to_keep(name, node, key, value, keys)
            if reason:
                _logger.info(f"probe.{key}={_text(value)}: not applied to analysis.{name}: {reason}")
            else:
                _set_probe_key(node, key, None if value == ALL_IMAGES and key == "n_images" else value)
    for key in values:
        common[key] = None


def _reason_to_keep(name: str, node: Any, key: str, value: Any, keys: Collection[str]) -> str:
    """Return why an analysis keeps its own value of a key of its probe; empty where it takes the common one."""
    if _is_overridden(name, key, keys):
        return "its probe is set as a whole"  # perhaps without this key
    own_keys, refused, reason = _OWN_IMAGES.get(str(node.get("_target_")), ((), None, ""))
    return reason if key in own_keys and refused in (None, value) else ""


def apply_checkpoint_defaults(cfg: DictConfig, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    """Let analyses of a checkpoint without a run measure test images without augmentation and no weight decay, in place.

    How such a checkpoint was trained is not known. What the command line states wins: ``probe.*`` (which is applied before),
    ``analysis.<name>.probe.*``, ``objective`` and ``objective.weight_decay``, and an experiment. An analysis with the settings
    of the released code keeps its images. A folder of such a checkpoint that is measured again keeps its objective.

    Args:
        cfg: Composed configuration of ``conf/analyze.yaml``.
        overrides: Overrides of the command line.

    Returns:
        The groups in which a default was set: ``images``, ``objective``.
    """
    keys = overridden_keys(overrides)
    if not cfg.get("ckpt_path") or "experiment" in keys:
        return ()
    changed = []
    for name, node in _analysis_nodes(cfg):
        if str(node.get("_target_")) in _OWN_IMAGES or node.get("preset") == "official":
            continue
        for key, value in (("split", "test"), ("augment", False)):
            if not keys & {"probe", f"probe.{key}"} and not _is_overridden(name, key, keys):
                is_other = (node.get("probe") or {}).get(key, value) != value
                changed += ["images"] if is_other else []
                _set_probe_key(node, key, value)
    objective_keys = {"objective", "objective.weight_decay", "objective.l2"}
    if not cfg.get("run") and not keys & objective_keys and cfg.objective.get("weight_decay"):
        cfg.objective.weight_decay = 0.0
        changed.append("objective")
    return tuple(dict.fromkeys(changed))


@contextlib.contextmanager
def provided(cfg: DictConfig) -> Iterator[None]:
    """Let a stored configuration of an earlier version have the keys ``probe.*`` within the block."""
    is_missing = "probe" not in cfg
    with open_dict(cfg):
        if is_missing:
            cfg.probe = dict.fromkeys(COMMON_KEYS)
    try:
        yield
    finally:
        with open_dict(cfg):
            if is_missing:
                del cfg["probe"]


def checked_probe(common: Any) -> dict[str, Any]:
    """Return the values of ``probe`` at the top of a configuration.

    Raises:
        ConfigError: Not a group of keys, an unknown key, or a value of another kind.
    """
    values = loading.plain(common)
    if not isinstance(values, dict):
        raise ConfigError("probe", values, "not a group of keys", "set probe.split=test")
    for key, value in values.items():
        if key not in (*COMMON_KEYS, CACHE):
            fix = f"{errors.nearest(str(key), (*COMMON_KEYS, CACHE))} an analysis alone has analysis.<name>.probe.{key}"
            raise ConfigError(f"probe.{key}", value, "no key of all analyses", fix)
    split, n_images, augment = (values.get(key) for key in COMMON_KEYS)
    if split is not None and not isinstance(split, str):
        raise ConfigError("probe.split", split, "not the name of a split", "set train, val or test")
    if n_images not in (None, ALL_IMAGES) and (type(n_images) is not int or n_images < 1):
        raise ConfigError("probe.n_images", n_images, "not a number of images", "set a number from 1 on, or all")
    if values.get(CACHE) is not None:
        check_choice(values[CACHE])
    recipes = loading.options("objective")
    if augment is not None and not isinstance(augment, bool) and augment not in recipes:
        fix = errors.nearest(str(augment), ["true", "false", *recipes])
        raise ConfigError("probe.augment", augment, "neither true, false nor an objective", fix)
    return values


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys and groups that the overrides of a command line set."""
    return {re.split(r"[=@]", override.lstrip("+~"))[0] for override in overrides}


def _analysis_nodes(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Yield the nodes of chosen analyses by name; what an experiment sets for others has no ``_target_``."""
    for name, node in (cfg.get("analysis") or {}).items():
        if OmegaConf.is_dict(node) and "_target_" in node:
            yield str(name), node


def _is_overridden(analysis: str, key: str, keys: Collection[str]) -> bool:
    path = f"analysis.{analysis}.probe"
    return path in keys or f"{path}.{key}" in keys


def _set_probe_key(node: DictConfig, key: str, value: Any) -> None:
    with open_dict(node):
        if node.get("probe") is None:
            node.probe = {}
        node.probe[key] = value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
