"""Attacks in pixel space: small changes that raise the loss, kept inside a ball and inside the range of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.errors import NumericalError

NORMS = ("linf", "l2")
ATTACKS = ("fgsm", "pgd")

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ball:
    """The changes an attack may make: ``norm`` at most ``radius``, and pixels stay where pixels can be.

    Attributes:
        norm: ``linf`` (every value) or ``l2`` (an image as one vector).
        radius: in pixels of [0, 1].
    """

    norm: str
    radius: float

    def into(self, change: Tensor, pixels: Tensor) -> Tensor:
        """Return the change ``(B, C, H, W)`` moved into the ball and clipped so that pixels stay in [0, 1].

        A pixel that lies outside of [0, 1] already may keep its value.
        """
        if self.norm == "linf":
            change = change.clamp(-self.radius, self.radius)
        else:
            change = change * (self.radius / self.length(change).clamp_min(1e-30)).clamp_max(1.0)
        low, high = pixels.clamp_max(0.0), pixels.clamp_min(1.0)
        return (pixels + change).clamp(low, high) - pixels

    def steepest(self, gradient: Tensor, length: float) -> Tensor:
        """Return the step of that length along which the loss rises fastest."""
        if self.norm == "linf":
            return length * gradient.sign()
        return length * gradient / self.length(gradient).clamp_min(1e-30)

    def length(self, change: Tensor) -> Tensor:
        """Return each image's norm ``(B, 1, 1, 1)``."""
        if self.norm == "linf":
            return change.abs().amax(dim=(1, 2, 3), keepdim=True)
        return change.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()

    def drawn(self, pixels: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """Return a start drawn uniformly from the ball, from each image's own generator."""
        shape = pixels.shape[1:]
        if self.norm == "linf":
            draws = np.stack([rng.uniform(-1, 1, shape) for rng in generators])
        else:
            size = int(np.prod(shape))
            draws = np.stack([rng.standard_normal(shape) for rng in generators])
            radii = np.array([rng.random() ** (1 / size) for rng in generators])
            draws *= (radii / np.linalg.norm(draws.reshape(len(draws), -1), axis=1))[:, None, None, None]
        return self.into(self.radius * torch.from_numpy(draws).to(pixels), pixels)


@dataclass(frozen=True)
class Found:
    """The worst change of each image: the change ``(B, C, H, W)``, its loss and whether the class stays right ``(B,)``."""

    change: Tensor
    loss: Tensor
    right: Tensor

    def or_worse(self, other: Found) -> Found:
        """Return for each image the worse of two: a wrong class first, then the larger loss."""
        worse = torch.where(self.right == other.right, other.loss > self.loss, self.right)
        pick = worse[:, None, None, None]
        return Found(
            torch.where(pick, other.change, self.change),
            torch.where(worse, other.loss, self.loss),
            torch.where(worse, other.right, self.right),
        )


def fgsm(forward: Forward, pixels: Tensor, labels: Tensor, ball: Ball) -> Found:
    """One step to the border of the ball along the gradient's sign (Goodfellow et al. 2015, section 4)."""
    _, gradient = _looked_at(forward, pixels, torch.zeros_like(pixels), labels)
    change = ball.into(ball.steepest(gradient, ball.radius), pixels)
    return _looked_at(forward, pixels, change, labels)[0]


def pgd(
    forward: Forward,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    starts: list[list[np.random.Generator]],
) -> Found:
    """Projected gradient ascent from random starts, the worst point on the way kept (Madry et al. 2018, section 2.1).

    Args:
        forward: pixels to logits.
        pixels: ``(B, C, H, W)``.
        labels: ``(B,)``.
        ball: what is allowed.
        steps: at each start.
        step_size: in pixels of [0, 1].
        starts: for each start, each image's generator.
    """
    worst: Found | None = None
    for generators in starts:
        change = ball.drawn(pixels, generators)
        for step in range(steps + 1):
            found, gradient = _looked_at(forward, pixels, change, labels)
            worst = found if worst is None else worst.or_worse(found)
            if step < steps:
                change = ball.into(change + ball.steepest(gradient, step_size), pixels)
    assert worst is not None
    return worst


def _looked_at(forward: Forward, pixels: Tensor, change: Tensor, labels: Tensor) -> tuple[Found, Tensor]:
    """Return what the model makes of a change, and the gradient of the loss with respect to it."""
    change = change.detach().requires_grad_()
    logits = forward(pixels + change)
    loss = F.cross_entropy(logits, labels, reduction="none")
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("analysis.adversarial", None, "logits are not finite", "look at the weights")
    (gradient,) = torch.autograd.grad(loss.sum(), change)  # images do not see each other
    return Found(change.detach(), loss.detach(), logits.detach().argmax(dim=1) == labels), gradient
