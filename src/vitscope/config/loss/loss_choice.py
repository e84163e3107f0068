"""The loss that a configuration chooses: a name, or a class or function of the user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vitscope.config import instantiate, target_allowlist
from vitscope.config.loading import DEFAULT_LOSS, plain
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

KEY = "objective.loss"


def check(objective: Mapping[str, Any]) -> None:
    """Check the loss of an objective, and that its label smoothing can be applied.

    Raises:
        ConfigError: Naming the key.
    """
    from vitscope.core.losses.named_losses import LOSSES  # imports torch

    value = objective.get("loss", DEFAULT_LOSS)
    if value in LOSSES:
        return
    if isinstance(value, str) and "." not in value:
        fix = f"{errors.nearest(value, LOSSES)}, or name a class or a function such as mylab.losses.focal"
        raise ConfigError(KEY, value, f"not one of {', '.join(LOSSES)}", fix)
    node = _node(value)
    target = target_allowlist.check_target(node, KEY)
    target_allowlist.check_role(node, KEY)
    _check_arguments(node, target)
    smoothing = objective.get("label_smoothing") or 0.0
    if smoothing > 0:
        reason = "cannot be applied to a loss of your own"
        raise ConfigError("objective.label_smoothing", smoothing, reason, "set it to 0 and smooth inside the loss")


def build(objective: Mapping[str, Any]) -> str | Callable[..., Any]:
    """Return the loss of an objective: its name, or the callable that its ``_target_`` names, with the node's other keys.

    Raises:
        ConfigError: A loss that cannot be made, or one with parameters to train.
    """
    from torch import nn

    from vitscope.core.losses.named_losses import LOSSES

    value = plain(objective).get("loss", DEFAULT_LOSS)
    if value in LOSSES:
        return value
    node = _node(value)
    target = target_allowlist.check_target(node, KEY)
    if not inspect.isclass(target):
        keywords = {key: entry for key, entry in node.items() if key not in instantiate.RESERVED}
        return functools.partial(target, **keywords) if keywords else target
    loss = instantiate.instantiate(node, KEY)
    if not callable(loss):
        raise ConfigError(f"{KEY}._target_", node["_target_"], "its instances are not callable", "define __call__")
    if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
        reason = "has parameters, which no optimizer trains here"
        raise ConfigError(f"{KEY}._target_", node["_target_"], reason, "make them buffers, or part of the model")
    return loss


def _node(value: Any) -> dict[str, Any]:
    """Return the mapping with ``_target_`` that a loss of the user's own is, also where its dotted name alone is given."""
    if isinstance(value, str):
        return {"_target_": value}
    if not isinstance(value, Mapping) or "_target_" not in value:
        raise ConfigError(KEY, value, "neither a name nor a mapping with _target_", "set objective.loss=mse")
    return dict(value)


def _check_arguments(node: Mapping[str, Any], target: Callable[..., Any]) -> None:
    """Check that a function takes outputs, targets and the node's other keys, a class the other keys."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # one of C code
        return
    keywords = {key: value for key, value in node.items() if key not in instantiate.RESERVED}
    outputs_and_targets = [] if inspect.isclass(target) else [None, None]
    try:
        signature.bind(*outputs_and_targets, **keywords)
    except TypeError as error:
        raise ConfigError(f"{KEY}._target_", node["_target_"], str(error), "see its arguments") from None
