"""Early termination of a sweep: W&B's ``hyperband`` rule, read from the trials' own journals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitscope.runtime.errors import ConfigError

_KEYS = {"type", "min_iter", "max_iter", "s", "eta", "strict"}


def rungs(node: Mapping[str, Any]) -> list[int]:
    """Return the iterations at which trials are compared.

    ``min_iter, eta``: min_iter x eta^k for k = 0, 1, ...; ``max_iter, s, eta``: max_iter / eta^k for k = 1 ... s. One
    iteration is one logged value of the sweep's metric, so for ``val/*`` one validation.

    Raises:
        ConfigError: Another type than ``hyperband``, unknown keys, or no rung at all.
    """
    if node.get("type") != "hyperband":
        raise ConfigError(
            "early_terminate.type", node.get("type"), "not supported", "use hyperband, or leave early_terminate out"
        )
    unknown = sorted(set(node) - _KEYS)
    if unknown:
        raise ConfigError(
            f"early_terminate.{unknown[0]}", node[unknown[0]], "no such key", f"choose from {', '.join(sorted(_KEYS))}"
        )
    eta = node.get("eta", 3)
    if not isinstance(eta, int | float) or eta <= 1:
        raise ConfigError("early_terminate.eta", eta, "not greater than 1", "set eta: 3")
    if "min_iter" in node:
        if not isinstance(node["min_iter"], int) or node["min_iter"] < 1:
            raise ConfigError(
                "early_terminate.min_iter", node["min_iter"], "not a whole number of at least 1", "set min_iter: 3"
            )
        return sorted({int(node["min_iter"] * eta**k) for k in range(20)})
    steps = {int(node.get("max_iter", 0) / eta**k) for k in range(1, int(node.get("s", 0)) + 1)} - {0}
    if not steps:
        raise ConfigError("early_terminate", None, "no iteration to compare at", "give min_iter, or max_iter and s")
    return sorted(steps)


def hopeless(
    history: Sequence[float], others: Sequence[Sequence[float]], at: Sequence[int], eta: float, larger: bool
) -> int | None:
    """Return the rung at which a trial falls behind, or None.

    At its last rung r, its best value of the first r iterations is compared with that of every trial that reached r (itself
    among them): it goes on as one of the best ``ceil(n / eta)``. The first to arrive always goes on, so that trials need
    not wait for each other (asynchronous successive halving; W&B's rule differs in stopping at the quantile).

    Args:
        history: The trial's metric values, oldest first.
        others: The other trials' metric values, finished and stopped ones too.
        at: The rungs.
        eta: The share that goes on is 1 / eta.
        larger: Whether a larger value is better.
    """
    reached = [rung for rung in at if rung <= len(history)]
    if not reached:
        return None
    rung = reached[-1]
    best = max if larger else min
    best_value = best(history[:rung])
    peers = [best_value, *(best(values[:rung]) for values in others if len(values) >= rung)]
    threshold = sorted(peers, reverse=larger)[math.ceil(len(peers) / eta) - 1]
    behind = best_value < threshold if larger else best_value > threshold
    return rung if behind else None
