"""Calibration of a model's confidence: likelihood, Brier score, calibration errors, temperature scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import EVALUATION, evaluations, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes, class_loss
from vitscope.core.measure_options import record_options
from vitscope.core.objective import hard_targets, labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ValidationProbe
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.calibration import _bins
from vitscope.diagnostics.calibration._debiased import DebiasedError, debiased_error, gaps
from vitscope.diagnostics.calibration._temperature import fit_temperature
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import PositiveInt, Seed, ShareBelowOne
from vitscope.stats.intervals import estimate, few_images, share_interval, where_enough_wrong


@dataclass(frozen=True)
class CalibrationResult(Result):
    """Calibration of the most probable class; every mean is over images, intervals are of 95 % over images.

    Attributes:
        accuracy: Share of images that are classified rightly.
        nll: Mean of -log p(label), nats; no label smoothing, whatever the objective.
        brier: Mean of the squared distance between the probabilities and the one-hot label, in [0, 2].
        ece: Expected calibration error over ``n_bins`` intervals of equal width, as it is usually reported: biased upwards, by
            the most for a calibrated model and few images.
        ece_debiased: The calibration error without that bias; 0 where the error is no larger than a calibrated model's would be.
        adaptive_ece: The calibration error over ``n_bins`` intervals that hold equally many images, equal confidences in one.
        signed_error: Mean confidence minus accuracy: above 0 for an over-confident model.
        cutoff: The confidence above which a prediction counts as confident.
        confident_accuracy: Accuracy among confident predictions (Acc-90 at the default cutoff); None without any.
        confident_frequency: Share of confident predictions (Freq-90).
        unconfidence: Share of unconfident predictions among wrong ones (Unc-90); None without a wrong one.
        intervals: ``accuracy_lower``, ``accuracy_upper`` and so on. Of accuracy that of
            `vitscope.stats.intervals.share_interval`, of nll and brier Student's, NaN with fewer than 128 images or
            10 wrong answers. That of ``ece`` is for the error without its bias: it holds 0 for 95 of 100 calibrated models, and
            always holds both ``ece`` and ``ece_debiased``
            (docs/definitions.md section 8). NaN with fewer than 30 images for each bin that has any.
        binning: ``equal_width`` or ``official``.
        bin_edges: (n_bins + 1,) of the equal-width intervals (a, b].
        bin_count: (n_bins,) images in each.
        bin_confidence: (n_bins,) mean confidence, 0 in an empty bin.
        bin_accuracy: (n_bins,) accuracy, 0 in an empty bin.
        temperature: Fitted on the validation images; None without them, as all that follows.
        scaled_nll: The nll with logits divided by the temperature; likewise the other ``scaled_`` values.
        scaled_brier: ``brier`` after scaling.
        scaled_ece: ``ece`` after scaling.
        scaled_ece_debiased: ``ece_debiased`` after scaling.
        scaled_adaptive_ece: ``adaptive_ece`` after scaling.
        scaled_bin_count: (n_bins,), empty without a temperature.
        scaled_bin_confidence: (n_bins,), likewise.
        scaled_bin_accuracy: (n_bins,), likewise.
        n_images: Images measured.
        n_validation: Images with a label that the temperature was fitted on.
        card: Conditions of the measurement.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    signed_error: float
    cutoff: float
    confident_accuracy: float | None
    confident_frequency: float
    unconfidence: float | None
    intervals: dict[str, float]
    binning: str
    bin_edges: np.ndarray
    bin_count: np.ndarray
    bin_confidence: np.ndarray
    bin_accuracy: np.ndarray
    temperature: float | None
    scaled_nll: float | None
    scaled_brier: float | None
    scaled_ece: float | None
    scaled_adaptive_ece: float | None
    scaled_bin_count: np.ndarray
    scaled_bin_confidence: np.ndarray
    scaled_bin_accuracy: np.ndarray
    n_images: int
    n_validation: int
    ece_debiased: float = float("nan")  # the default is for results of an older version
    scaled_ece_debiased: float | None = None
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        names = (
            "accuracy",
            "nll",
            "brier",
            "ece",
            "ece_debiased",
            "adaptive_ece",
            "signed_error",
            "confident_accuracy",
        )
        names += ("confident_frequency", "unconfidence", "temperature", "scaled_nll", "scaled_brier", "scaled_ece")
        names += ("scaled_ece_debiased",)
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a pass over the images and one over those of validation; the temperature is found from their logits."""
    n_validation = workload.input_size(options, "validation")
    works = [evaluations(workload, {}, Count.exactly(1)), *guard_checks(workload)]
    if n_validation:
        works += [
            Work(EVALUATION, Count.exactly(1), n_validation),
            *guard_checks(replace(workload, n_images=n_validation)),
        ]
    return MeasureCost(works)


@declares_cost(_cost)
@record_options
def calibration(
    probe: Probe,
    *,
    validation: ValidationProbe | None = None,
    n_bins: PositiveInt = 10,
    binning: _bins.Binning = "equal_width",
    cutoff: ShareBelowOne = 0.9,
    seed: Seed = 0,
) -> CalibrationResult:
    """Measure calibration, and what is left of the error after temperature scaling.

    Args:
        probe: The images to measure on. Soft targets count as their most probable class.
        validation: Images of neither training nor ``probe``, on which the temperature is fitted; no scaling without.
        n_bins: Number of confidence intervals (10 in Park and Kim).
        binning: ``equal_width``, or ``official``: the released code's bins, which lose a confidence of exactly 1.
        cutoff: Confidence above which a prediction counts as confident.
        seed: Number without an effect: the intervals take no draws.

    Raises:
        ValueError: An unknown binning, fewer than one bin, a cutoff outside [0, 1), logits that are not finite, no image
            with a label, or another loss than the cross entropy.
    """
    check_classes(probe, "calibration")
    if binning not in _bins.BINNINGS:
        raise ValueError(f"Expected binning to be one of {', '.join(_bins.BINNINGS)}, received {binning!r}.")
    if n_bins < 1 or not 0 <= cutoff < 1:
        raise ValueError(f"Expected n_bins >= 1 and cutoff in [0, 1), received {n_bins} and {cutoff}.")
    rule = _bins.equal_width if binning == "equal_width" else _bins.official
    logits, labels, numbers = _logits(probe, "calibration")
    plain = _scores(logits, labels, numbers, rule, n_bins)
    sure = plain.confidence > cutoff
    temperature, scaled, n_validation = None, None, 0
    if validation is not None:
        n_validation = validation.n_labeled
        temperature = fit_temperature(*_logits(validation, "temperature")[:2])
        scaled = _scores(logits / temperature, labels, numbers, rule, n_bins)
    empty = np.empty(0)
    warn_nulls("calibration", few_images(len(plain.nll)))
    return CalibrationResult(
        accuracy=float(plain.correct.mean()),
        nll=float(plain.nll.mean()),
        brier=float(plain.brier.mean()),
        ece=plain.bins.error,
        ece_debiased=plain.debiased.error,
        adaptive_ece=plain.adaptive,
        signed_error=plain.bins.signed_error,
        cutoff=cutoff,
        confident_accuracy=_mean(plain.correct[sure]),
        confident_frequency=float(sure.mean()),
        unconfidence=_mean(~sure[plain.correct == 0]),
        intervals=_intervals(plain),
        binning=binning,
        bin_edges=plain.bins.edges,
        bin_count=plain.bins.count,
        bin_confidence=plain.bins.confidence,
        bin_accuracy=plain.bins.accuracy,
        temperature=temperature,
        scaled_nll=float(scaled.nll.mean()) if scaled else None,
        scaled_brier=float(scaled.brier.mean()) if scaled else None,
        scaled_ece=scaled.bins.error if scaled else None,
        scaled_ece_debiased=scaled.debiased.error if scaled else None,
        scaled_adaptive_ece=scaled.adaptive if scaled else None,
        scaled_bin_count=scaled.bins.count if scaled else empty,
        scaled_bin_confidence=scaled.bins.confidence if scaled else empty,
        scaled_bin_accuracy=scaled.bins.accuracy if scaled else empty,
        n_images=len(plain.nll),
        n_validation=n_validation,
        card=probe.card(loss=class_loss(probe)),
    )


@dataclass(frozen=True)
class _Scores:
    nll: np.ndarray  # (n,) each image's
    brier: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    bins: _bins.Bins
    adaptive: float
    debiased: DebiasedError


def _logits(probe: Probe, description: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's logits ``(n, classes)`` in float64, labels ``(n,)`` and batch numbers ``(n,)``."""
    logits, labels, numbers = [], [], []
    with probe.guard() as model, distributed.failing_together():
        for index, (x, y) in track(probe.local_batches(), description):
            z = model(x).double()
            if not torch.isfinite(z).all():
                raise ValueError(f"Expected finite logits, received NaN or infinity in batch {index}.")
            counts = labeled(y)
            logits.append(z[counts])
            labels.append(hard_targets(y)[counts])
            numbers.append(torch.full_like(labels[-1], index))
    if not logits:  # a rank without a batch still takes part in the sums
        none = torch.zeros(0, dtype=torch.long, device=probe.device)
        return torch.zeros(0, 1, dtype=torch.float64, device=probe.device), none, none
    return torch.cat(logits), torch.cat(labels), torch.cat(numbers)


def _scores(logits: Tensor, labels: Tensor, numbers: Tensor, rule: Callable[..., _bins.Bins], n_bins: int) -> _Scores:
    log_p = logits.log_softmax(dim=1)
    confidence, predicted = log_p.exp().max(dim=1)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)  # (N, K) at (N, 1) to (N,)
    # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_y + 1
    brier = log_p.mul(2).exp().sum(dim=1) - 2 * nll.neg().exp() + 1
    local = torch.stack([numbers.double(), nll, brier, confidence, (predicted == labels).double()])  # (5, n)
    rows = np.concatenate(distributed.gather_objects(local.cpu().numpy()), axis=1)
    if rows.shape[1] == 0:
        raise ValueError("Expected at least one image with a label, received batches in which every label is ignored.")
    # in the order of the batches, not of the ranks, so that sums do not depend on the number of these
    _, nll, brier, sure, right = rows[:, np.argsort(rows[0], kind="stable")]
    sure = np.minimum(sure, 1.0)
    bins, adaptive = rule(sure, right, n_bins), _bins.equal_mass(sure, right, n_bins).error
    return _Scores(nll, brier, sure, right, bins, adaptive, debiased_error(gaps(bins, sure, right)))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _intervals(scores: _Scores) -> dict[str, float]:
    n = len(scores.nll)
    low, high = share_interval(scores.correct.sum(), n)
    bounds = {"accuracy_lower": float(low), "accuracy_upper": float(high)}
    wrong = np.array(n - scores.correct.sum())
    for name in ("nll", "brier"):
        values = getattr(scores, name)
        found_mean = estimate(n, values.sum(), np.square(values).sum())
        mean, half_width = float(found_mean.mean), float(where_enough_wrong(found_mean.half_width, wrong))
        bounds |= {f"{name}_lower": mean - half_width, f"{name}_upper": mean + half_width}
    # never without the plain error, which may be above where many bins hold few images
    return bounds | {"ece_lower": scores.debiased.low, "ece_upper": max(scores.debiased.high, scores.bins.error)}
