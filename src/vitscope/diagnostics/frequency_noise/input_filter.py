"""Accuracy on low-pass and on high-pass images, by cut-off: which frequencies a model needs, and which suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import changed_evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes, check_images
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.frequency_noise._bands import filtered, frequency
from vitscope.diagnostics.frequency_noise._perturbed_evaluation import Means, perturbed
from vitscope.runtime.distributed import failing_together
from vitscope.runtime.value_ranges import OpenUnitInterval, UnitInterval
from vitscope.stats.intervals import check_level


@dataclass(frozen=True)
class InputFilterResult(Result, coordinates={"cutoff": "cutoff"}):
    """Accuracy (shares in [0, 1]) and loss (nats) by cut-off, whose unit is pi.

    Attributes:
        cutoff: (n_cutoffs,) ascending.
        low_pass_accuracy: (n_cutoffs,) on images of the frequencies up to the cut-off.
        low_pass_accuracy_half_width: (n_cutoffs,) half its t-interval over images; NaN where fewer than 10
            answers are right, or wrong.
        low_pass_nll: (n_cutoffs,) the loss there.
        high_pass_accuracy: (n_cutoffs,) on images of the constant part and the frequencies above the cut-off.
        high_pass_accuracy_half_width: (n_cutoffs,) likewise.
        high_pass_nll: (n_cutoffs,) the loss there.
        clean_accuracy: Accuracy on unfiltered images.
        clean_nll: NLL on unfiltered images, in nats.
        chance: One over the number of classes.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    cutoff: np.ndarray
    low_pass_accuracy: np.ndarray
    low_pass_accuracy_half_width: np.ndarray
    low_pass_nll: np.ndarray
    high_pass_accuracy: np.ndarray
    high_pass_accuracy_half_width: np.ndarray
    high_pass_nll: np.ndarray
    clean_accuracy: float
    clean_nll: float
    chance: float
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the clean accuracy, and the mean over cut-offs of both kinds of images."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "low_pass_accuracy_mean": float(self.low_pass_accuracy.mean()),
            "high_pass_accuracy_mean": float(self.high_pass_accuracy.mean()),
        }


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return an evaluation of the clean images and two for each cut-off."""
    n = len({float(cutoff) for cutoff in options["cutoffs"]})
    works = [changed_evaluations(workload, 2 * n), *guard_checks(workload)]
    return MeasureCost(works, result_bytes=ENTRY * 7 * n)


def _check(cutoffs: Sequence[float]) -> None:
    if not cutoffs or not all(0 <= cutoff <= 1 for cutoff in cutoffs):
        raise ValueError(f"Expected cutoffs in [0, 1], at least one, received {list(cutoffs)}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
def input_filter(
    probe: Probe,
    *,
    cutoffs: Sequence[UnitInterval] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    level: OpenUnitInterval = 0.95,
    partial: ResumableRows | None = None,
) -> InputFilterResult:
    """Measure accuracy on images without the frequencies above, or below, each cut-off.

    The filters are ideal squares, rho = max(|k|/(h/2), |l|/(w/2)) <= cut-off in units of pi, the bands of
    `frequency_noise_robustness`. High-pass images keep their constant part, so color and brightness stay what they were;
    hence filtering pixels and filtering normalized images are the same. Nothing is clamped.

    Args:
        probe: Model and images.
        cutoffs: Frequencies at which the filters cut, in [0, 1].
        level: Coverage of the intervals.
        partial: Finished rows of an interrupted measurement.

    Raises:
        ValueError: No cut-off, one outside [0, 1], a level outside (0, 1), another loss than the cross entropy, or
            batches of more than images and targets.
    """
    check_classes(probe, "input_filter")
    check_images(probe, "input_filter")
    check_level(level)
    ordered = sorted({float(cutoff) for cutoff in cutoffs})
    x, _ = next(iter(probe.batches))
    rho = frequency(int(x.shape[-2]), int(x.shape[-1]))
    below = [rho <= cutoff + 1e-9 for cutoff in ordered]
    keep = [*below, *(~mask | (rho == 0) for mask in below)]
    names = [f"{side}-{cutoff:g}" for side in ("low", "high") for cutoff in ordered]

    def change(images: Tensor, batch: int, v: int) -> Tensor:
        return filtered(images, keep[v])

    means = Means("losses", answers=("correct",))
    with failing_together():
        for losses, correct, n_classes in perturbed(probe, names, change, "filtered images", partial):
            means.n_classes = n_classes
            means.add(correct=correct.T, losses=losses.T)
    estimates = means.finish(level)
    (clean, *accuracy), (_, *half_width), (clean_nll, *nll) = (
        a.tolist() for a in (estimates["correct"].mean, estimates["correct"].half_width, estimates["losses"].mean)
    )
    bad = {
        name: "logits are not finite" for name, value in zip(["clean", *names], [clean, *accuracy]) if value != value
    }
    warn_nulls("input_filter", bad | ({"the intervals": "a single image"} if estimates["correct"].count == 1 else {}))
    n = len(ordered)
    return InputFilterResult(
        cutoff=np.array(ordered),
        low_pass_accuracy=np.array(accuracy[:n]),
        low_pass_accuracy_half_width=np.array(half_width[:n]),
        low_pass_nll=np.array(nll[:n]),
        high_pass_accuracy=np.array(accuracy[n:]),
        high_pass_accuracy_half_width=np.array(half_width[n:]),
        high_pass_nll=np.array(nll[n:]),
        clean_accuracy=clean,
        clean_nll=clean_nll,
        chance=1 / max(means.n_classes, 1),
        level=level,
        n_images=estimates["correct"].count,
        card=probe.card(solver={"filter": "ideal square, constant part kept"}),
    )
