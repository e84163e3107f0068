"""The ball of allowed changes, what the model makes of a change, and the attacks FGSM and PGD in pixel space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.adversarial._losses import Loss, log_odds
from vitscope.runtime.errors import NumericalError

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ball:
    """The changes an attack may make: ``norm`` at most ``radius``, and pixels stay where pixels can be.

    Attributes:
        norm: ``linf`` (every value) or ``l2`` (an image as one vector).
        radius: Radius of the ball, in pixels of [0, 1].
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
        # the squares of very small entries would be zero
        scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return length * scaled / self.length(scaled).clamp_min(1e-30)

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
            # norms (B,) of images (B, C, H, W), then (B, 1, 1, 1)
            draws *= (radii / np.linalg.norm(draws.reshape(len(draws), -1), axis=1))[:, None, None, None]
        return self.into(self.radius * torch.from_numpy(draws).to(pixels), pixels)


@dataclass(frozen=True)
class AttackResult:
    """The worst change of each image.

    Attributes:
        change: ``(B, C, H, W)`` pixels of [0, 1].
        score: ``(B,)`` log odds of a wrong class, float64: the cross entropy is ``softplus(score)``.
        right: ``(B,)`` whether the class stays right.
        blind: ``(B,)`` whether every gradient that was taken was exactly zero; True where none was taken.
    """

    change: Tensor
    score: Tensor
    right: Tensor
    blind: Tensor

    def or_worse(self, other: AttackResult) -> AttackResult:
        """Return for each image the worse of two: a wrong class first, then the larger loss."""
        worse = torch.where(self.right == other.right, other.score > self.score, self.right)
        pick = worse[:, None, None, None]
        return AttackResult(
            torch.where(pick, other.change, self.change),
            torch.where(worse, other.score, self.score),
            torch.where(worse, other.right, self.right),
            self.blind & other.blind,
        )

    def replaced(self, index: Tensor, other: AttackResult) -> AttackResult:
        """Return this with ``other`` in the place of the images ``index``."""
        pairs = (
            (self.change, other.change),
            (self.score, other.score),
            (self.right, other.right),
            (self.blind, other.blind),
        )
        return AttackResult(*(whole.index_copy(0, index, part) for whole, part in pairs))

    def at(self, index: Tensor) -> AttackResult:
        """Return those of the images ``index``."""
        return AttackResult(self.change[index], self.score[index], self.right[index], self.blind[index])


def fgsm(forward: Forward, pixels: Tensor, labels: Tensor, ball: Ball, loss: Loss) -> AttackResult:
    """One step to the border of the ball along the gradient's sign (Goodfellow et al. 2015, section 4)."""
    first, gradient, _ = evaluated(forward, pixels, torch.zeros_like(pixels), labels, loss)
    result, _ = looked_at(forward, pixels, ball.into(ball.steepest(gradient, ball.radius), pixels), labels, loss)
    return AttackResult(result.change, result.score, result.right, first.blind)


def pgd(
    forward: Forward,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    loss: Loss,
    *,
    steps: int,
    step_size: float,
    starts: list[list[np.random.Generator]],
) -> AttackResult:
    """Projected gradient ascent from random starts (Madry et al. 2018, section 2.1).

    The worst point on the way is kept, the image as it is included.

    Args:
        forward: Pixels to logits.
        pixels: ``(B, C, H, W)``.
        labels: ``(B,)``.
        ball: Set of allowed images.
        loss: Function from logits and labels to the loss that is raised.
        steps: Number of steps at each start.
        step_size: Length of a step, in pixels of [0, 1].
        starts: Random generators of the images, for each start.
    """
    worst, _ = looked_at(forward, pixels, torch.zeros_like(pixels), labels, loss)
    for generators in starts:
        change = ball.drawn(pixels, generators)
        for step in range(steps + 1):
            result, gradient, _ = evaluated(forward, pixels, change, labels, loss)
            worst = worst.or_worse(result)
            if step < steps:
                change = ball.into(change + ball.steepest(gradient, step_size), pixels)
    return worst


def evaluated(
    forward: Forward, pixels: Tensor, change: Tensor, labels: Tensor, loss: Loss
) -> tuple[AttackResult, Tensor, Tensor]:
    """Return what the model makes of a change, the gradient of the loss with respect to it, and the loss ``(B,)``.

    Raises:
        ValueError: The model's logits do not depend differentiably on the pixels.
    """
    change = change.detach().requires_grad_()
    with torch.enable_grad():
        logits = _finite(forward(pixels + change)).double()
        value = loss(logits, labels)
        if not value.requires_grad:
            raise ValueError(
                "Expected a model whose logits can be differentiated by the image, received one without gradients: "
                "use attacks=('square',), which needs none."
            )
        (gradient,) = torch.autograd.grad(value.sum(), change)  # images do not see each other
    if not bool(torch.isfinite(gradient).all()):
        raise NumericalError(
            "analysis.adversarial",
            None,
            "gradients are not finite",
            "measure a checkpoint from before the training diverged",
        )
    logits = logits.detach()
    blind = gradient.abs().amax(dim=(1, 2, 3)) == 0
    result = AttackResult(change.detach(), log_odds(logits, labels), logits.argmax(dim=1) == labels, blind)
    return result, gradient, value.detach()


@torch.no_grad()
def looked_at(
    forward: Forward, pixels: Tensor, change: Tensor, labels: Tensor, loss: Loss
) -> tuple[AttackResult, Tensor]:
    """Return what the model makes of a change, and the loss ``(B,)``, without a gradient."""
    logits = _finite(forward(pixels + change)).double()
    right = logits.argmax(dim=1) == labels
    return AttackResult(change, log_odds(logits, labels), right, torch.ones_like(right)), loss(logits, labels)


def _finite(logits: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(
            "analysis.adversarial",
            None,
            "logits are not finite",
            "measure a checkpoint from before the training diverged",
        )
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Expected logits of shape (images, classes) of two classes or more, received {tuple(logits.shape)}."
        )
    return logits
