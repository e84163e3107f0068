"""Top-1 and top-5 accuracy of a model on a split, with the logits of absent classes masked where asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import EVALUATION, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes, class_loss
from vitscope.core.measure_options import record_options
from vitscope.core.objective import hard_targets, labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.diagnostics.evaluation._class_order import warn_of_other_order
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.stats.intervals import share_interval

#: values of ``classes`` besides a list
Choice = Literal["all", "present"]
CHOICES: tuple[str, ...] = get_args(Choice)


@dataclass(frozen=True)
class EvaluationResult(Result, coordinates={"class": "classes", "class_name": "class_names"}):
    """Means over images; NaN where a logit that counts is not finite.

    Attributes:
        accuracy: Share of images whose largest logit is the label's.
        accuracy_top5: Share of images whose label is among the five largest logits (all, where there are fewer).
        accuracy_lower: Lower end of the 95% interval of ``accuracy`` over images (`vitscope.stats.intervals.share_interval`).
        accuracy_upper: Upper end.
        mean_class_accuracy: Mean of ``class_accuracy`` over the classes that have images.
        nll: Mean of -log p(label), nats, p being the softmax over the classes that count.
        classes: (n_classes,) the logits that count, ascending.
        class_names: (n_classes,) their names, where they are known.
        class_count: (n_classes,) images of each.
        class_accuracy: (n_classes,) NaN without an image.
        n_logits: Logits of the model.
        n_images: Images measured: those that have a label.
        card: Conditions of the measurement.
    """

    accuracy: float
    accuracy_top5: float
    accuracy_lower: float
    accuracy_upper: float
    mean_class_accuracy: float
    nll: float
    classes: np.ndarray
    class_names: tuple[str, ...]
    class_count: np.ndarray
    class_accuracy: np.ndarray
    n_logits: int
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        names = ("accuracy", "accuracy_top5", "accuracy_lower", "accuracy_upper", "mean_class_accuracy", "nll")
        return {**{name: getattr(self, name) for name in names}, "n_classes": float(len(self.classes))}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return one evaluation."""
    works = [Work(EVALUATION, Count.exactly(1), workload.n_images), *guard_checks(workload)]
    return MeasureCost(works)


def _check(classes: str | Sequence[int | str]) -> None:
    if not classes or (isinstance(classes, str) and classes not in CHOICES):
        raise ValueError(f"Expected classes to be {', '.join(CHOICES)} or a list, received {classes!r}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
def evaluation(probe: Probe, *, classes: Choice | Sequence[int | str] = "all") -> EvaluationResult:
    """Evaluate a model on the probe's images.

    Args:
        probe: The images; soft targets count as their most probable class.
        classes: The logits that compete: ``all``; ``present``: the classes that have images in the split, as ImageNet-A and
            ImageNet-R are scored (Hendrycks et al. 2021); or a list of indices or of class names.

    Raises:
        ValueError: An unknown choice or class, an image of a class that is left out or that the model does not have, no
            image with a label, or another loss than the cross entropy.
    """
    check_classes(probe, "evaluation")
    rows, n_logits, columns = [], 0, torch.empty(0, dtype=torch.long)
    with probe.guard() as model, distributed.failing_together():
        for index, (x, y) in track(probe.local_batches(), "evaluation"):
            counts = labeled(y)
            logits, labels = model(x)[counts], hard_targets(y)[counts]
            if not rows:
                n_logits = logits.shape[1]
                columns = torch.tensor(_chosen(probe, classes, n_logits), device=logits.device)
            # (B, 1) and the columns of `_scored` to (B, 6)
            rows.append(torch.cat([torch.full_like(labels, index)[:, None], _scored(logits, labels, columns)], dim=1))
    local = torch.cat(rows).cpu().numpy() if rows else np.empty((0, 6))
    shares = distributed.gather_objects((local, n_logits, columns.cpu().numpy()))
    n_logits, competing = next((n, c) for _, n, c in shares if n)  # a rank may have no batch
    every = np.concatenate([share for share, _, _ in shares])
    if not len(every):
        raise ValueError("Expected at least one image with a label, received batches in which every label is ignored.")
    return _result(probe, every[np.argsort(every[:, 0], kind="stable")], competing, n_logits)


def _scored(logits: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    """Return label, top-1, top-5, NLL and answer of each image ``(B, 5)`` in float64; NaN where its logits are not finite."""
    z = logits.double()[:, columns]
    place = torch.searchsorted(columns, labels.contiguous()).clamp_max(len(columns) - 1)
    if bool((columns[place] != labels).any()):
        stranger = int(labels[columns[place] != labels][0])
        raise ValueError(f"Expected images of the {len(columns)} classes that count, received one of class {stranger}.")
    order = z.topk(min(5, len(columns)), dim=1).indices  # (B, 5)
    best = order == place[:, None]
    right = torch.stack([best[:, 0], best.any(dim=1)], dim=1).double()
    nll = -z.log_softmax(dim=1).gather(1, place[:, None])
    right = right.masked_fill(~torch.isfinite(z).all(dim=1, keepdim=True), torch.nan)
    return torch.cat([labels.double()[:, None], right, nll, columns[order[:, :1]].double()], dim=1)


def _chosen(probe: Probe, classes: str | Sequence[int | str], n_logits: int) -> list[int]:
    names = tuple(probe.about.get("class_names") or ())
    present = probe.about.get("present_classes")
    if classes == "all":
        class_indices: list[Any] = list(range(n_logits))
        if present and len(present) < n_logits:
            what = f"the split has images of {len(present)} of the model's {n_logits} classes and all of them compete"
            warnings.warn(f"evaluation: {what}; classes=present masks the others", stacklevel=3)
    elif classes == "present":
        class_indices = list(present or _seen(probe))
    else:
        class_indices = [names.index(c) if c in names else c for c in classes]
    bad = [c for c in class_indices if not isinstance(c, int) or not 0 <= c < n_logits]
    if bad or not class_indices:
        raise ValueError(f"Expected classes among the model's {n_logits}, received {bad[0] if bad else 'none'!r}.")
    return sorted(set(class_indices))


def _seen(probe: Probe) -> list[int]:
    labels: set[int] = set()
    for _, y in probe.batches:
        labels.update(hard_targets(y)[labeled(y)].tolist())
    return sorted(labels)


def _result(probe: Probe, rows: np.ndarray, classes: np.ndarray, n_logits: int) -> EvaluationResult:
    _, labels, right, top5, nll, answers = rows.T
    warn_of_other_order(labels.astype(int), answers.astype(int))
    place = np.searchsorted(classes, labels)
    count = np.bincount(place, minlength=len(classes))
    with np.errstate(invalid="ignore"):  # 0 / 0 where a class has no image
        by_class = np.bincount(place, right, minlength=len(classes)) / count
    names: Sequence[str] = probe.about.get("class_names") or ()
    accuracy = float(right.mean())
    lower, upper = (float(end) for end in share_interval(right.sum(), len(right)))  # NaN where an answer is NaN
    facts: dict[str, Any] = {"loss": class_loss(probe), "solver": {"classes": f"{len(classes)} of {n_logits} logits"}}
    if len(classes) < n_logits:  # another softmax: not to be overlaid with one over all classes
        facts["loss"] = f"cross entropy over {len(classes)} of {n_logits} classes"
    return EvaluationResult(
        accuracy=accuracy,
        accuracy_top5=float(top5.mean()),
        accuracy_lower=lower,
        accuracy_upper=upper,
        mean_class_accuracy=float(by_class[count > 0].mean()),
        nll=float(nll.mean()),
        classes=classes,
        class_names=tuple(str(names[c]) for c in classes) if len(names) > int(classes[-1]) else (),
        class_count=count,
        class_accuracy=by_class,
        n_logits=n_logits,
        n_images=len(rows),
        card=probe.card(**facts),
    )
