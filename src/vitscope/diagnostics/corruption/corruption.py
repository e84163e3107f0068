"""Accuracy under common corruptions: published data sets, or the same corruptions made on the fly (Fig 12b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import EVALUATION, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.input_normalization import pixels_of
from vitscope.core.losses.requirements import check_classes, check_images, class_loss
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.corruption._archives import archive
from vitscope.diagnostics.corruption._baselines import ALEXNET
from vitscope.diagnostics.corruption._conditions import CLEAN, CORRUPTED_IMAGES, measured, type_names
from vitscope.diagnostics.corruption._scores import (
    Baseline,
    alexnet,
    check_baseline,
    corruption_errors,
    relative_errors,
)
from vitscope.diagnostics.corruption._severity_table import COMMON, SEVERITIES
from vitscope.runtime.value_ranges import PositiveInt, Seed


@dataclass(frozen=True)
class CorruptionResult(Result, coordinates={"type": "types", "severity": "severities"}):
    """Means go over the fifteen common types that were measured (over the others where none of them was).

    Attributes:
        types: (n_types,) names.
        severities: (n_severities,) from 1 to 5.
        accuracy: (n_types, n_severities).
        nll: (n_types, n_severities) nats.
        ece: (n_types, n_severities), ten equal-width bins.
        clean_accuracy: Accuracy on the probe's images.
        clean_nll: Nats.
        clean_ece: Expected calibration error on the probe's images.
        mean_accuracy: The mean of the accuracies over types and severities.
        mean_accuracy_standard_error: Standard error of this mean over images, after the mean over the conditions of each
            image, which are not independent. NaN where all images agree, and for a single one.
        baseline: Network whose errors divide those measured; empty for none.
        ce: (n_types,) corruption error in percent of the baseline's, NaN where it has none; empty without a baseline.
        relative_ce: (n_types,) likewise of the loss against clean images; NaN also where the baseline loses nothing.
        mce: Mean of ``ce``, percent; None without a baseline.
        relative_mce: Mean of ``relative_ce``, percent; None also where the baseline's clean error is not published.
        source: ``generated``, or the layout of the data set: ``arrays`` or ``folders``.
        n_images: Images a condition.
        type_standard_error: (n_types,) of each type's accuracy, averaged over severities, over images like
            ``mean_accuracy_standard_error``. Empty in results of earlier versions.
        severity_standard_error: (n_severities,) of each severity's accuracy, averaged over the same types as all means.
        clean_standard_error: Standard error of the accuracy on the probe's images.
        card: Conditions of the measurement.
    """

    types: tuple[str, ...]
    severities: np.ndarray
    accuracy: np.ndarray
    nll: np.ndarray
    ece: np.ndarray
    clean_accuracy: float
    clean_nll: float
    clean_ece: float
    mean_accuracy: float
    mean_accuracy_standard_error: float
    baseline: str
    ce: np.ndarray
    relative_ce: np.ndarray
    mce: float | None
    relative_mce: float | None
    source: str
    n_images: int
    type_standard_error: np.ndarray = field(default_factory=lambda: np.empty(0))
    severity_standard_error: np.ndarray = field(default_factory=lambda: np.empty(0))
    clean_standard_error: float = float("nan")
    card: ObjectiveCard | None = None

    @property
    def severity_accuracy(self) -> np.ndarray:
        """The mean accuracy at each severity ``(n_severities,)``."""
        return self.accuracy[_reported(self.types)].mean(axis=0)

    def scalars(self) -> dict[str, float]:
        """Return the means, and the mean accuracy at each severity."""
        scalars: dict[str, float | None] = {"clean_accuracy": self.clean_accuracy, "mean_accuracy": self.mean_accuracy}
        scalars |= {"mce": self.mce, "relative_mce": self.relative_mce}
        scalars |= {f"severity_{s}_accuracy": float(a) for s, a in zip(self.severities, self.severity_accuracy)}
        return {name: value for name, value in scalars.items() if value is not None}


def _cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return an evaluation of the clean images and of each condition, and the making of the images.

    Published files, which are read from a disk, and the comparison with a second model have no formula.
    """
    if options.get("root") is not None or options.get("other") is not None:
        return None
    n_types, n_severities = len(type_names(options["types"])), len(tuple(options["severities"]))
    n_conditions = n_types * n_severities
    works = [
        Work(EVALUATION, Count.exactly(1 + n_conditions), workload.n_images),
        Work(CORRUPTED_IMAGES, Count.exactly(1), workload.n_images),
        *guard_checks(workload),
    ]
    # severities; accuracy, nll and ece of each condition; standard errors of types and of severities
    return MeasureCost(works, result_bytes=ENTRY * (2 * n_severities + n_types + 3 * n_conditions))


def _check(types: str | Sequence[str], severities: Sequence[int], baseline: str) -> None:
    type_names(types)
    check_baseline(baseline)
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"Expected severities from 1 to 5, received {list(severities)}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
def corruption(
    probe: Probe,
    *,
    root: str | None = None,
    types: str | Sequence[str] = "common",
    severities: Sequence[int] = SEVERITIES,
    baseline: str = "auto",
    other: Probe | None = None,
    n_images: PositiveInt | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: Seed = 0,
    partial: ResumableRows | None = None,
) -> CorruptionResult:
    """Measure accuracy under fifteen types of corruption at five severities.

    Source: Hendrycks and Dietterich (2019). Without ``root`` the corruptions are made from the probe's images, each image's
    draws fixed by ``seed``, its place and the type. They are not the published files: numbers compare among models of
    this package, not with the literature.

    Args:
        probe: The model and the clean images.
        root: A folder of CIFAR-10-C or CIFAR-100-C arrays, or of ImageNet-C folders.
        types: ``common`` (15), ``validation`` (4), ``all``, or names.
        severities: Severities to measure, from 1 to 5.
        baseline: ``imagenet``, ``cifar10``, ``cifar100`` (AlexNet's published errors), ``none``, or ``auto``: the one of the
            probe's data where ``root`` is given.
        other: A reference model to divide by instead, measured under the same conditions.
        n_images: Images a condition of a published data set, spread evenly; None for all.
        mean: The data's normalization; by default the probe's (see `vitscope.core.input_normalization`).
        std: Their standard deviations, likewise.
        seed: Seed of the generated corruptions.
        partial: Finished conditions, see `vitscope.core.weight_space`.

    Raises:
        ValueError: An unknown type, severity or baseline, no normalization, another loss than the cross entropy, or
            batches of more than images and targets.
        DataError: A data set that is missing or damaged.
    """
    check_classes(probe, "corruption")
    check_images(probe, "corruption")
    names = type_names(types)
    source = archive(root, names, n_images, probe.about.get("class_names")) if root is not None else None
    conditions = [CLEAN, *((name, severity) for name in names for severity in severities)]
    shape = (len(names), len(severities))
    reference = _published(probe, baseline, root, names, severities)

    def measure(compared: Probe, name: str) -> Sequence[Mapping[str, Any]]:
        pixels = pixels_of(compared, mean, std)
        return measured(compared, conditions, name, source=source, pixels=pixels, seed=seed, partial=partial)

    rows = measure(probe, "model")
    if other is not None:
        reference = _baseline_of_model(measure(other, "other"), shape)
    accuracy, clean = _table(rows, "accuracy", shape), float(rows[0]["accuracy"])
    ce = relative_ce = np.empty(0)
    if reference is not None:
        ce = corruption_errors(1 - accuracy, reference)
        relative_ce = relative_errors(1 - accuracy, 1 - clean, reference)
        null = [name for name, errors in zip(names, reference.error) if errors.sum() == 0]
        warn_nulls("corruption", dict.fromkeys(null, "the baseline has no errors there to divide by"))
    correct = np.stack([row["correct"] for row in rows[1:]]).reshape(*shape, -1)  # (types, severities, images)
    reported = _reported(names)
    by_image = correct[reported].mean(axis=(0, 1))
    return CorruptionResult(
        types=names,
        severities=np.array(severities),
        accuracy=accuracy,
        nll=_table(rows, "nll", shape),
        ece=_table(rows, "ece", shape),
        clean_accuracy=clean,
        clean_nll=float(rows[0]["nll"]),
        clean_ece=float(rows[0]["ece"]),
        mean_accuracy=float(by_image.mean()) if np.isfinite(accuracy[reported]).all() else np.nan,
        mean_accuracy_standard_error=standard_error(by_image),
        baseline="" if reference is None else reference.name,
        ce=ce,
        relative_ce=relative_ce,
        mce=_mean(ce, names),
        relative_mce=_mean(relative_ce, names),
        source="generated" if source is None else type(source).__name__.lower(),
        n_images=len(by_image),
        type_standard_error=np.array([standard_error(images) for images in correct.mean(axis=1)]),
        severity_standard_error=np.array([standard_error(images) for images in correct[reported].mean(axis=0)]),
        clean_standard_error=standard_error(np.asarray(rows[0]["correct"], np.float64)),
        card=probe.card(loss=class_loss(probe), solver={"corruptions": root or "generated", "seed": seed}),
    )


def _published(
    probe: Probe, baseline: str, root: str | None, names: Sequence[str], severities: Sequence[int]
) -> Baseline | None:
    if baseline == "auto":
        data = str(probe.about.get("data", "")).partition(",")[0]
        baseline = data if root is not None and data in ALEXNET else "none"
    return None if baseline == "none" else alexnet(baseline, names, severities)


def _baseline_of_model(rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> Baseline:
    """Return the errors of another model, measured under the same conditions, as the baseline."""
    return Baseline("another model", 1 - _table(rows, "accuracy", shape), 1 - float(rows[0]["accuracy"]))


def _table(rows: Sequence[Mapping[str, Any]], key: str, shape: tuple[int, int]) -> np.ndarray:
    # (types * severities,) to (types, severities)
    return np.array([float(row[key]) for row in rows[1:]]).reshape(shape)


def _reported(types: Sequence[str]) -> np.ndarray:
    common = np.array([name in COMMON for name in types])
    return common if common.any() else ~common


def _mean(errors: np.ndarray, types: Sequence[str]) -> float | None:
    mean = float(errors[_reported(types)].mean()) if len(errors) else np.nan
    return mean if np.isfinite(mean) else None


def standard_error(by_image: np.ndarray) -> float:
    """Return the standard error of the mean of ``by_image (n,)``; NaN for fewer than two images, and where all of them agree.

    Images that agree have no spread to judge by: an error of 0 would say that the mean is known.
    """
    if len(by_image) < 2 or np.ptp(by_image) <= 8 * np.finfo(np.float64).eps * np.abs(by_image).max():
        return float("nan")
    return float(by_image.std(ddof=1) / np.sqrt(len(by_image)))
