"""Accuracy under attack: FGSM and PGD in pixel space."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitscope import interrupt
from vitscope.diagnostics.adversarial._attacks import ATTACKS, NORMS, Ball, Found, fgsm, pgd
from vitscope.evaluate import evaluate
from vitscope.measure_options import record_options
from vitscope.objective import Objective, hard_targets
from vitscope.pixels import Pixels, pixels_of
from vitscope.points import rows
from vitscope.probe import ObjectiveCard, Probe

#: a gray level in pixels of [0, 1]
LEVEL = 1 / 255


@dataclass(frozen=True)
class AdversarialResult:
    """Robust accuracy is an upper bound: a stronger attack may find more.

    Attributes:
        attacks: (n_attacks,) ``fgsm``, ``pgd``.
        epsilons: (n_epsilons,) radii in gray levels, 1/255 of the pixels' range.
        norm: ``linf`` or ``l2``.
        accuracy: (n_attacks, n_epsilons).
        accuracy_standard_error: (n_attacks, n_epsilons) over images.
        nll: (n_attacks, n_epsilons) nats, of the worst change found.
        largest_change: (n_attacks, n_epsilons) the largest norm among the changes, gray levels; at most epsilon.
        clean_accuracy: on the images as they are.
        clean_nll: nats.
        steps: of PGD, at each start.
        restarts: random starts of PGD.
        n_images: images attacked.
        card: the conditions.
    """

    attacks: tuple[str, ...]
    epsilons: np.ndarray
    norm: str
    accuracy: np.ndarray
    accuracy_standard_error: np.ndarray
    nll: np.ndarray
    largest_change: np.ndarray
    clean_accuracy: float
    clean_nll: float
    steps: int
    restarts: int
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the accuracies."""
        found = {"clean_accuracy": self.clean_accuracy}
        for attack, accuracies in zip(self.attacks, self.accuracy):
            found |= {f"{attack}_{epsilon:g}_accuracy": float(a) for epsilon, a in zip(self.epsilons, accuracies)}
        return found


@record_options
def adversarial(
    probe: Probe,
    *,
    attacks: Sequence[str] = ATTACKS,
    epsilons: Sequence[float] = (1, 2, 4, 8),
    norm: str = "linf",
    steps: int = 20,
    step_size: float = 2.5,
    restarts: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    partial: MutableMapping[str, Mapping[str, Any]] | None = None,
) -> AdversarialResult:
    """Attack every image and measure what accuracy is left.

    The loss is the cross entropy on the label; the model stays in eval mode. Changes are measured in pixels, before the
    normalisation, and pixels stay in [0, 1]. PGD keeps the worst point that it meets, so it is never weaker for more steps.

    Args:
        probe: model and images; soft targets count as their most probable class.
        attacks: ``fgsm`` (Goodfellow et al. 2015), ``pgd`` (Madry et al. 2018).
        epsilons: radii in gray levels.
        norm: ``linf``: each value changes by at most epsilon; ``l2``: an image by at most epsilon as a vector.
        steps: of PGD, at each start.
        step_size: of PGD as a multiple of epsilon / steps.
        restarts: random starts of PGD.
        mean: the data's normalisation; by default the probe's (see `vitscope.pixels`).
        std: likewise.
        seed: of the starts; each image has its own draws.
        partial: finished attacks, see `vitscope.points`.

    Raises:
        ValueError: an unknown attack or norm, a negative radius, no step, no start or no normalisation.
    """
    _check(attacks, epsilons, norm, steps, restarts)
    pixels = pixels_of(probe, mean, std)
    conditions = [(attack, float(epsilon)) for attack in attacks for epsilon in epsilons]
    with probe.guard() as model:
        hard = ((x, hard_targets(y)) for _, (x, y) in probe.local_batches())
        clean = evaluate(model, hard, Objective(), device=probe.device)
    with probe.guard(second_order=True) as model:
        for p in model.parameters():
            p.requires_grad_(False)  # only images are differentiated; the guard gives the flags back

        def row(condition: tuple[str, float]) -> Mapping[str, Any]:
            attack, epsilon = condition
            ball = Ball(norm, epsilon * LEVEL)
            options = {"steps": steps, "step_size": step_size * ball.radius / steps}
            return _attacked(probe, model, pixels, attack, ball, options, restarts, seed)

        found = rows(conditions, row, name=lambda c: f"{c[0]} {c[1]:g}", partial=partial, description="adversarial")
    shape = (len(attacks), len(epsilons))
    accuracy, nll, largest = (np.array([float(r[key]) for r in found]).reshape(shape) for key in _KEYS)
    return AdversarialResult(
        attacks=tuple(attacks),
        epsilons=np.array(epsilons, dtype=np.float64),
        norm=norm,
        accuracy=accuracy,
        accuracy_standard_error=np.sqrt(accuracy * (1 - accuracy) / max(clean.n_images - 1, 1)),
        nll=nll,
        largest_change=largest,
        clean_accuracy=clean.accuracy,
        clean_nll=clean.nll,
        steps=steps,
        restarts=restarts,
        n_images=clean.n_images,
        card=probe.card(),
    )


_KEYS = ("accuracy", "nll", "largest")


def _attacked(
    probe: Probe, model: nn.Module, pixels: Pixels, attack: str, ball: Ball, options: dict, restarts: int, seed: int
) -> Mapping[str, Any]:
    def forward(images: Tensor) -> Tensor:
        interrupt.check()
        return model(pixels.to_input(images))

    totals, largest, place = np.zeros(3), 0.0, 0
    for x, y in probe.iter_batches():
        images, labels = pixels.to_pixels(x), hard_targets(y)
        if attack == "fgsm":
            found: Found = fgsm(forward, images, labels, ball)
        else:
            starts = [
                [np.random.default_rng((seed, start, place + i)) for i in range(len(x))] for start in range(restarts)
            ]
            found = pgd(forward, images, labels, ball, starts=starts, **options)
        place += len(x)
        totals += [len(x), float(found.right.sum()), float(found.loss.double().sum())]
        largest = max(largest, float(ball.length(found.change).max()) / LEVEL)
    return {"accuracy": totals[1] / totals[0], "nll": totals[2] / totals[0], "largest": largest}


def _check(attacks: Sequence[str], epsilons: Sequence[float], norm: str, steps: int, restarts: int) -> None:
    unknown = [attack for attack in attacks if attack not in ATTACKS]
    if unknown or not attacks:
        raise ValueError(
            f"Expected attacks among {', '.join(ATTACKS)}, received {unknown[0] if unknown else 'none'!r}."
        )
    if norm not in NORMS:
        raise ValueError(f"Expected norm to be one of {', '.join(NORMS)}, received {norm!r}.")
    if not epsilons or any(not 0 <= epsilon < np.inf for epsilon in epsilons):
        raise ValueError(f"Expected epsilons of at least 0, received {list(epsilons)}.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"Expected at least one step and one start, received steps={steps} and restarts={restarts}.")
