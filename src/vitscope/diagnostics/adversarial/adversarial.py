"""Accuracy under attack in pixel space: FGSM, PGD, Auto-PGD, the Square Attack and a suite of the last two."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.checks.independent_images import refuse_dependent_images
from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.evaluation import evaluate
from vitscope.core.input_normalization import Pixels, pixels_of
from vitscope.core.losses.requirements import check_classes, check_images, class_loss
from vitscope.core.measure_options import record_options
from vitscope.core.objective import Objective, hard_targets, labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.diagnostics.adversarial._attacks import NORMS, Ball, Norm
from vitscope.diagnostics.adversarial._cost import attack_cost
from vitscope.diagnostics.adversarial._losses import LOSSES
from vitscope.diagnostics.adversarial._suite import ATTACKS, SUITE, Images, Settings, attacked
from vitscope.runtime import stop_flag
from vitscope.runtime.resumable_map import map_resumably
from vitscope.runtime.value_ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Seed
from vitscope.stats.intervals import share_interval

#: a gray level in pixels of [0, 1]
LEVEL = 1 / 255


@dataclass(frozen=True)
class AdversarialResult(Result, coordinates={"attack": ("attacks", "suite_attacks"), "epsilon": "epsilons"}):
    """Robust accuracy is an upper bound: a stronger attack may find more.

    Attributes:
        attacks: (n_attacks,) names, see `adversarial`.
        epsilons: (n_epsilons,) radii in gray levels, 1/255 of the pixels' range.
        norm: ``linf`` or ``l2``.
        accuracy: (n_attacks, n_epsilons).
        accuracy_low: (n_attacks, n_epsilons) lower ends of the 95% intervals over images, see
            `vitscope.stats.intervals.share_interval`.
        accuracy_high: (n_attacks, n_epsilons) upper ends.
        nll: (n_attacks, n_epsilons) nats, of the worst change found; all but FGSM and PGD leave an image alone once its class
            is wrong.
        zero_gradient: (n_attacks, n_epsilons) share of images at which all gradients were exactly zero, so that the attack was
            blind; NaN for ``square``, which takes none.
        suite_attacks: (n_members,) the attacks that ``suite`` ran in their order, empty without it.
        suite_accuracy: (n_members, n_epsilons) accuracy left after each of them and those before it.
        settings: Loss, steps, starts and the like of each attack that ran, members of the suite included.
        largest_change: (n_attacks, n_epsilons) the largest norm among the changes, gray levels; at most epsilon.
        clean_accuracy: Accuracy on the images as they are.
        clean_nll: Nats.
        n_images: Images attacked.
        card: Conditions of the measurement.
    """

    attacks: tuple[str, ...]
    epsilons: np.ndarray
    norm: str
    accuracy: np.ndarray
    accuracy_low: np.ndarray
    accuracy_high: np.ndarray
    nll: np.ndarray
    zero_gradient: np.ndarray
    suite_attacks: tuple[str, ...]
    suite_accuracy: np.ndarray
    settings: Mapping[str, Mapping[str, Any]]
    largest_change: np.ndarray
    clean_accuracy: float
    clean_nll: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the accuracies."""
        values = {"clean_accuracy": self.clean_accuracy}
        for attack, accuracies in zip(self.attacks, self.accuracy):
            values |= {f"{attack}_{epsilon:g}_accuracy": float(a) for epsilon, a in zip(self.epsilons, accuracies)}
        for member, accuracies in zip(self.suite_attacks, self.suite_accuracy):
            values |= {f"suite_after_{member}_{e:g}_accuracy": float(a) for e, a in zip(self.epsilons, accuracies)}
        return values


def _check(attacks: Sequence[str], epsilons: Sequence[float], norm: str, loss: str) -> None:
    unknown = [attacks] if isinstance(attacks, str) else [attack for attack in attacks if attack not in ATTACKS]
    if unknown or not attacks:
        received = repr(unknown[0]) if attacks else "none"
        raise ValueError(f"Expected attacks among {', '.join(ATTACKS)}, received {received}.")
    if len(set(attacks)) < len(attacks):
        raise ValueError(f"Expected each attack once, received {', '.join(attacks)}.")
    for name, value, allowed_values in (("norm", norm, NORMS), ("loss", loss, tuple(LOSSES))):
        if value not in allowed_values:
            raise ValueError(f"Expected {name} to be one of {', '.join(allowed_values)}, received {value!r}.")
    if not epsilons or any(not 0 <= epsilon < np.inf for epsilon in epsilons):
        raise ValueError(f"Expected epsilons of at least 0, received {list(epsilons)}.")


def _check_searches(steps: int, restarts: int, iterations: int, n_targets: int, queries: int, step_size: float) -> None:
    numbers = {
        "steps": steps, "restarts": restarts, "iterations": iterations, "n_targets": n_targets, "queries": queries,
    }  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1, received {value}.")
    if not 0 < step_size < np.inf:
        raise ValueError(f"Expected step_size above 0, received {step_size}.")


@declares_cost(attack_cost)
@record_options
@checks_options(_check)
@checks_options(_check_searches)
def adversarial(
    probe: Probe,
    *,
    attacks: Sequence[str] = ("fgsm", "pgd"),
    epsilons: Sequence[NonNegativeFloat] = (1, 2, 4, 8),
    norm: Norm = "linf",
    loss: str = "ce",
    steps: PositiveInt = 20,
    step_size: PositiveFloat = 2.5,
    restarts: PositiveInt = 1,
    iterations: PositiveInt = 100,
    n_targets: PositiveInt = 9,
    queries: PositiveInt = 5000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: Seed = 0,
    partial: ResumableRows | None = None,
) -> AdversarialResult:
    """Attack every image and measure what accuracy is left.

    The model stays in eval mode, and is lifted to float32 from half precision. Changes are measured in pixels, before the
    normalization, and pixels stay in [0, 1]. Every attack keeps the worst point that it meets, so more starts or another member
    of the suite never raise the accuracy.

    The cross entropy is raised by its log odds, log((1 - p) / p): the same direction, but it does not underflow where the margin
    is large. Where a gradient is exactly zero all the same, the result and a warning say so.

    Args:
        probe: Model and images; soft targets count as their most probable class.
        attacks: ``fgsm`` (Goodfellow et al. 2015); ``pgd`` (Madry et al. 2018); ``apgd_ce``, ``apgd_dlr``, ``apgd_cw``: Auto-PGD
            on a loss, ``apgd_t``: on the targeted DLR of several classes (Croce and Hein 2020); ``square``: random search
            without gradients (Andriushchenko et al. 2020); ``suite``: apgd_ce, apgd_t and square, each on the images that are
            left, which is AutoAttack's standard version without FAB-T.
        epsilons: Radii in gray levels.
        norm: ``linf``: each value changes by at most epsilon; ``l2``: an image by at most epsilon as a vector.
        loss: Loss that FGSM and PGD raise: ``ce`` (cross entropy), ``dlr`` (difference of logits ratio), ``cw`` (Carlini and
            Wagner's difference of logits).
        steps: Number of steps of PGD at each start.
        step_size: Length of a step of PGD, as a multiple of epsilon / steps.
        restarts: Random starts of every attack but FGSM; for ``apgd_t`` those of each target class.
        iterations: Number of iterations of APGD (AutoAttack's 100).
        n_targets: Target classes of ``apgd_t`` (AutoAttack's 9), at most all but the label.
        queries: Number of queries of ``square`` (AutoAttack's 5000).
        mean: The data's normalization; by default the probe's (see `vitscope.core.input_normalization`).
        std: Their standard deviations, likewise.
        seed: Seed of the starts; each image has its own draws.
        partial: Finished attacks, see `vitscope.core.weight_space`.

    Raises:
        ValueError: An unknown attack, norm or loss, a negative radius, no step, no start or no normalization; a model without
            gradients and an attack that needs them; another loss than the cross entropy, or batches of more than images and
            targets.
        NumericalError: Logits or gradients that are not finite.
    """
    check_classes(probe, "adversarial")
    check_images(probe, "adversarial")
    settings = Settings(loss, steps, step_size, restarts, iterations, n_targets, queries)
    pixels = pixels_of(probe, mean, std)
    conditions = [(attack, float(epsilon)) for attack in attacks for epsilon in epsilons]
    # one type for all: gray levels are no longer told apart in half precision
    dtype = torch.float32 if probe.dtype in (torch.bfloat16, torch.float16) else None
    with probe.guard(dtype=dtype) as model:
        hard = ((x, hard_targets(y)) for _, (x, y) in probe.local_batches())
        clean = evaluate(model, hard, Objective(), device=probe.device)
    with probe.guard(second_order=any(attack != "square" for attack in attacks), dtype=dtype) as model:
        for p in model.parameters():
            p.requires_grad_(False)  # only images are differentiated; the guard gives the flags back
        refuse_dependent_images(model, next(probe.iter_batches())[0][:2], 1, "adversarial")

        def compute(condition: tuple[str, float]) -> Mapping[str, Any]:
            attack, epsilon = condition
            return _row(probe, model, pixels, attack, Ball(norm, epsilon * LEVEL), settings, seed)

        rows = map_resumably(
            conditions,
            compute,
            name=lambda condition: "{} {:g}".format(*condition),
            partial=partial,
            description="adversarial",
        )
    shape = (len(attacks), len(epsilons))
    # rows to (n_attacks, n_epsilons)
    accuracy, nll, largest, blind = (np.array([float(row[key]) for row in rows]).reshape(shape) for key in _KEYS)
    _warn_blind(conditions, blind.reshape(-1))
    low, high = share_interval(np.rint(accuracy * clean.n_images), clean.n_images)
    members = [name for attack in attacks for name in (SUITE if attack == "suite" else (attack,))]
    stated = {name: settings.of(name) for name in dict.fromkeys(members)}
    suite = SUITE if "suite" in attacks else ()
    suite_accuracy = np.empty((0, len(epsilons)))
    if suite:
        surviving_shares = [row["left"] for (attack, _), row in zip(conditions, rows) if attack == "suite"]
        suite_accuracy = np.array(surviving_shares, dtype=np.float64).T  # (n_members, n_epsilons)
    card = probe.card(
        loss=class_loss(probe), solver={"attacks": stated, "norm": norm, "suite": list(suite), "seed": seed}
    )
    if dtype is not None:
        card = replace(card, dtype="float32")
    return AdversarialResult(
        attacks=tuple(attacks),
        epsilons=np.array(epsilons, dtype=np.float64),
        norm=norm,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        nll=nll,
        zero_gradient=blind,
        suite_attacks=suite,
        suite_accuracy=suite_accuracy,
        settings=stated,
        largest_change=largest,
        clean_accuracy=clean.accuracy,
        clean_nll=clean.nll,
        n_images=clean.n_images,
        card=card,
    )


_KEYS = ("accuracy", "nll", "largest", "blind")


def _row(
    probe: Probe, model: nn.Module, pixels: Pixels, attack: str, ball: Ball, settings: Settings, seed: int
) -> Mapping[str, Any]:
    """Return the means over all images of one attack at one radius."""

    def forward(images: Tensor) -> Tensor:
        stop_flag.check()
        return model(pixels.to_input(images))

    totals, n_surviving, largest, place = np.zeros(4), np.zeros(len(SUITE)), 0.0, 0
    for x, y in probe.iter_batches():
        counts = labeled(y)
        numbers = torch.arange(place, place + len(x))[counts.cpu()]
        place += len(x)
        if not len(numbers):
            continue
        images = Images(pixels.to_pixels(x[counts]), hard_targets(y)[counts], numbers, seed)
        result, remaining = attacked(attack, forward, images, ball, settings)
        nll = torch.nn.functional.softplus(result.score)
        totals += [len(numbers), float(result.right.sum()), float(nll.sum()), float(result.blind.sum())]
        n_surviving += remaining or 0
        largest = max(largest, float(ball.length(result.change).max()) / LEVEL)
    n = totals[0]
    blind = np.nan if attack == "square" else totals[3] / n
    return {
        "accuracy": totals[1] / n,
        "nll": totals[2] / n,
        "largest": largest,
        "blind": blind,
        "left": n_surviving / n,
    }


def _warn_blind(conditions: Sequence[tuple[str, float]], blind: np.ndarray) -> None:
    """Warn of attacks that saw no gradient: the accuracy that they leave says nothing of the model."""
    blind_attacks = [(attack, share) for (attack, radius), share in zip(conditions, blind) if radius > 0 and share > 0]
    for attack in dict.fromkeys(name for name, _ in blind_attacks):
        share = max(s for name, s in blind_attacks if name == attack)
        warnings.warn(
            f"adversarial: every gradient that {attack} took was exactly zero at {share:.0%} of the images, so it could not "
            "search there: use attacks=[square], which needs no gradients, or attacks=[suite]",
            RuntimeWarning,
            stacklevel=4,
        )
