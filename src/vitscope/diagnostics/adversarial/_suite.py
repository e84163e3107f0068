"""Attacks by name, and the suite that runs several of them one after the other on the images that are still classified right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.adversarial._apgd import apgd
from vitscope.diagnostics.adversarial._attacks import AttackResult, Ball, Forward, fgsm, looked_at, pgd
from vitscope.diagnostics.adversarial._losses import LOSSES, log_odds, towards
from vitscope.diagnostics.adversarial._square import square

#: the members of ``suite`` in their order: AutoAttack's (Croce and Hein 2020) without FAB-T
SUITE = ("apgd_ce", "apgd_t", "square")
ATTACKS = ("fgsm", "pgd", "apgd_ce", "apgd_dlr", "apgd_cw", "apgd_t", "square", "suite")

Generators = list[np.random.Generator]


@dataclass(frozen=True)
class Settings:
    """Strength of the attacks.

    Attributes:
        loss: Loss that FGSM and PGD raise, one of ``ce dlr cw``.
        steps: Number of steps of PGD at each start.
        step_size: Length of a step of PGD, as a multiple of the radius divided by ``steps``.
        restarts: Random starts of every attack but FGSM.
        iterations: Number of iterations of each run of APGD.
        n_targets: Classes that APGD-T tries, those of the largest logits of the clean image.
        queries: Number of queries of the Square Attack at each start.
    """

    loss: str = "ce"
    steps: int = 20
    step_size: float = 2.5
    restarts: int = 1
    iterations: int = 100
    n_targets: int = 9
    queries: int = 5000

    def of(self, attack: str) -> dict[str, Any]:
        """Return those that count for an attack."""
        used = {
            "fgsm": ("loss",),
            "pgd": ("loss", "steps", "step_size", "restarts"),
            "apgd_t": ("iterations", "n_targets", "restarts"),
            "square": ("queries", "restarts"),
        }.get(attack, ("iterations", "restarts"))
        stated = {"apgd_t": "targeted dlr", "square": "cw"}.get(attack, attack.removeprefix("apgd_"))
        return {"loss": stated} | {key: value for key, value in asdict(self).items() if key in used}


@dataclass(frozen=True)
class Images:
    """Images to attack.

    Attributes:
        pixels: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)``.
        places: ``(B,)`` each image's number among all images, which decides its draws.
        seed: Seed of all draws.
    """

    pixels: Tensor
    labels: Tensor
    places: Tensor
    seed: int

    def at(self, index: Tensor) -> Images:
        """Return the images ``index``."""
        return Images(self.pixels[index], self.labels[index], self.places[index.to(self.places.device)], self.seed)

    def generators(self, *stream: int) -> Generators:
        """Return each image's own generator of a stream of draws."""
        return [np.random.default_rng((self.seed, *stream, place)) for place in self.places.tolist()]


def attacked(
    attack: str, forward: Forward, images: Images, ball: Ball, settings: Settings
) -> tuple[AttackResult, list[int]]:
    """Return the worst changes found, and how many images were still right after each member of the suite.

    Args:
        attack: One of `ATTACKS`.
        forward: Pixels to logits.
        images: Images to attack.
        ball: The allowed changes.
        settings: Loss, steps, restarts and queries of the attacks.
    """
    pixels, labels = images.pixels, images.labels
    if attack == "fgsm":
        return fgsm(forward, pixels, labels, ball, LOSSES[settings.loss]), []
    if attack == "pgd":
        starts = [images.generators(start) for start in range(settings.restarts)]
        size = settings.step_size * ball.radius / settings.steps
        loss = LOSSES[settings.loss]
        return pgd(forward, pixels, labels, ball, loss, steps=settings.steps, step_size=size, starts=starts), []
    result, _ = looked_at(forward, pixels, torch.zeros_like(pixels), labels, log_odds)
    attackable, n_surviving = result.right, []
    for member in SUITE if attack == "suite" else (attack,):
        for run in _runs(member, forward, images, ball, settings):
            index = torch.nonzero(result.right).squeeze(1)  # (n, 1) to (n,)
            if not len(index):
                break
            result = result.replaced(index, result.at(index).or_worse(run(index)))
        n_surviving.append(int(result.right.sum()))
    result = replace(result, blind=result.blind & attackable)  # at the others no gradient was wanted
    return result, n_surviving if attack == "suite" else []


def _runs(
    attack: str, forward: Forward, images: Images, ball: Ball, settings: Settings
) -> Iterator[Callable[[Tensor], AttackResult]]:
    """Yield the runs of an attack, each a function of the images that it is made on."""
    number = ATTACKS.index(attack)
    # (N, n_targets), or the labels as (N, 1)
    ranking = _ranked_classes(forward, images, settings.n_targets) if attack == "apgd_t" else images.labels[:, None]
    for start in range(settings.restarts):
        for which in range(ranking.shape[1]):  # once, but for targets

            def run(index: Tensor, start: int = start, which: int = which) -> AttackResult:
                part = images.at(index)
                shared = {"generators": part.generators(number, start, which)}
                if attack == "square":
                    return square(forward, part.pixels, part.labels, ball, queries=settings.queries, **shared)
                targeted = attack == "apgd_t"
                loss = towards(ranking[index, which]) if targeted else LOSSES[attack.removeprefix("apgd_")]
                return apgd(forward, part.pixels, part.labels, ball, loss, iterations=settings.iterations, **shared)

            yield run


@torch.no_grad()
def _ranked_classes(forward: Forward, images: Images, n_targets: int) -> Tensor:
    """Return each image's classes but its label by descending logit, at most ``n_targets`` of them ``(B, n)``."""
    logits = forward(images.pixels).double().scatter(1, images.labels[:, None], -torch.inf)
    return logits.argsort(dim=1, descending=True, stable=True)[:, : min(n_targets, logits.shape[1] - 1)]
