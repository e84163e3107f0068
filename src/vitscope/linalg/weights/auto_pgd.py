"""Steps of auto-PGD, the projected gradient ascent of Croce & Hein (ICML 2020, section 3), in a ball around the origin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from vitscope.linalg.weights.directions import inner, norm, scale

#: momentum of APGD, and the share of improving steps below which it halves its step
_MOMENTUM, _IMPROVING = 0.75, 0.75


class StepSize:
    """Step size of APGD: halved at checkpoints if few steps have improved the loss, or none since it was kept.

    Args:
        value: The step size's first value.
        n_steps: Steps of the ascent.

    Attributes:
        value: The step size.
        n_improving: Steps since the last checkpoint after which the loss was the largest so far.
    """

    def __init__(self, value: float, n_steps: int) -> None:
        self.value = value
        self.n_improving = 0
        self._checkpoints = _checkpoints(n_steps)
        # of the last checkpoint: the step, and the step size and the best loss before it
        self._last, self._last_value, self._last_best = 0, value, -np.inf

    def is_halved(self, k: int, best: float) -> bool:
        """Halve the step size after step ``k`` where the rule demands it, and return whether it does."""
        if k not in self._checkpoints:
            return False
        is_stuck = self._last_value == self.value and self._last_best == best
        is_halved = is_stuck or self.n_improving < _IMPROVING * (k - self._last)
        self._last, self._last_value, self._last_best = k, self.value, best
        self.n_improving = 0
        if is_halved:
            self.value /= 2
        return is_halved


def _checkpoints(n_steps: int) -> set[int]:
    """Return the steps at which APGD may halve its step size."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {int(np.ceil(share * n_steps)) for share in shares[1:]}


def apgd_step(
    u: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    gradient: dict[str, Tensor],
    step: float,
    ball: str,
    radius: float,
    *,
    first: bool,
) -> dict[str, Tensor]:
    """Return the next point: steepest ascent, projection, and momentum except in the first step.

    Args:
        u: The point.
        before: The point before it.
        gradient: Gradient of the loss at the point.
        step: Step size.
        ball: ``l2`` or ``linf``.
        radius: Radius of the ball.
        first: Whether it is the first step.
    """
    if ball == "l2":
        length = norm(gradient)
        ahead = {name: u[name] + g * (step / length if length > 0 else 0.0) for name, g in gradient.items()}
    else:
        ahead = {name: u[name] + step * g.sign() for name, g in gradient.items()}
    _project(ahead, ball, radius)
    if first:
        return ahead
    mixed = {
        name: u[name] + _MOMENTUM * (ahead[name] - u[name]) + (1 - _MOMENTUM) * (u[name] - before[name])
        for name in ahead
    }
    _project(mixed, ball, radius)
    return mixed


def _project(u: dict[str, Tensor], ball: str, radius: float) -> None:
    """Move a point, in place, to the nearest one of the ball."""
    if ball == "l2":
        length = inner(u, u) ** 0.5
        scale(u, min(1.0, radius / length) if length > 0 else 1.0)
    else:
        for d in u.values():
            d.clamp_(-radius, radius)
