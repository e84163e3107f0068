"""Auto-PGD: projected gradient ascent that chooses its own step sizes (Croce and Hein 2020, algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.adversarial._attacks import AttackResult, Ball, Forward, evaluated
from vitscope.diagnostics.adversarial._losses import Loss

#: weight of the new step against the last one's direction
MOMENTUM = 0.75

#: share of steps between two checkpoints that must raise the loss for the step size to stay
RHO = 0.75


def apgd(
    forward: Forward,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    loss: Loss,
    *,
    iterations: int,
    generators: list[np.random.Generator],
) -> AttackResult:
    """Attack every image from one random start; the worst point on the way is kept.

    The first step size is twice the radius. At checkpoints it is halved, and the search restarts from the best point, where
    too few steps raised the loss or where neither step size nor best loss changed since the last checkpoint.

    Args:
        forward: Pixels to logits.
        pixels: ``(B, C, H, W)``.
        labels: ``(B,)``.
        ball: Set of allowed images.
        loss: Loss that the attack raises.
        iterations: Steps.
        generators: Each image's, for the start.
    """
    change = _start(ball, pixels, generators)
    worst, gradient, value = evaluated(forward, pixels, change, labels, loss)
    state = _Steps(ball, change, gradient, value, iterations)
    previous = change
    for step in range(iterations):
        weight = MOMENTUM if step else 1.0
        ahead = ball.into(change + state.size[:, None, None, None] * ball.steepest(gradient, 1.0), pixels)
        moved = ball.into(change + weight * (ahead - change) + (1 - weight) * (change - previous), pixels)
        previous, change = change, moved
        result, gradient, value = evaluated(forward, pixels, change, labels, loss)
        worst = worst.or_worse(result)
        change, gradient = state.after(change, gradient, value)
    return worst


def checkpoints(iterations: int) -> list[int]:
    """Return the steps w_j = p_j N at which the step size is judged, p: 0.22, then periods shorter by 0.03, at least 0.06."""
    period, least, shorter = (max(int(share * iterations), 1) for share in (0.22, 0.06, 0.03))
    steps, last = [], 0
    while last + period <= iterations:
        last += period
        steps.append(last)
        period = max(period - shorter, least)
    return steps


class _Steps:
    """The step size of each image, and the best point that it goes back to."""

    def __init__(self, ball: Ball, change: Tensor, gradient: Tensor, value: Tensor, iterations: int) -> None:
        self.size = torch.full_like(value, 2 * ball.radius, dtype=change.dtype)
        self._best_change, self._best_gradient, self._best = change, gradient, value
        self._last, self._best_at_checkpoint = value, value
        # the first checkpoint has none before it to compare with
        self._reduced = torch.ones_like(value, dtype=torch.bool)
        self._rises = torch.zeros_like(value)
        self._checkpoints = checkpoints(iterations)
        self._since, self._step = 0, 0

    def after(self, change: Tensor, gradient: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take note of a step's outcome; return the point and the gradient to go on from."""
        self._step += 1
        self._rises = self._rises + (value > self._last)
        self._last = value
        better = value > self._best
        self._best = torch.where(better, value, self._best)
        self._best_change = torch.where(_wide(better), change, self._best_change)
        self._best_gradient = torch.where(_wide(better), gradient, self._best_gradient)
        if self._step not in self._checkpoints:
            return change, gradient
        few = self._rises <= RHO * (self._step - self._since)
        stalled = ~self._reduced & (self._best_at_checkpoint >= self._best)
        self._reduced = few | stalled
        self._best_at_checkpoint = self._best
        self._since, self._rises = self._step, torch.zeros_like(value)
        self.size = torch.where(self._reduced, self.size / 2, self.size)
        back = _wide(self._reduced)
        return torch.where(back, self._best_change, change), torch.where(back, self._best_gradient, gradient)


def _start(ball: Ball, pixels: Tensor, generators: list[np.random.Generator]) -> Tensor:
    """Return a random change on the border of the ball, as the released code draws it."""
    shape = pixels.shape[1:]
    draws = [r.uniform(-1, 1, shape) if ball.norm == "linf" else r.standard_normal(shape) for r in generators]
    drawn = torch.from_numpy(np.stack(draws)).to(pixels)
    return ball.into(ball.radius * drawn / ball.length(drawn), pixels)


def _wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, None]  # (B,) to (B, 1, 1, 1)
