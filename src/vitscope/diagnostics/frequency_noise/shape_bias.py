"""Shape against texture on cue-conflict images (Geirhos et al., ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitscope.core.cost.image_passes import EVALUATION, evaluations, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes
from vitscope.core.measure_options import record_options
from vitscope.core.objective import hard_targets, labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.runtime.distributed import all_reduce_sum, failing_together, world_size
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import OpenUnitInterval
from vitscope.stats.intervals import check_level, share_interval


@dataclass(frozen=True)
class ShapeBiasResult(Result):
    """Decisions of a model for shape or texture where these name different classes.

    Attributes:
        shape_bias: Shape decisions divided by shape and texture decisions; 1 is pure shape. NaN without any.
        shape_bias_low: Lower end of its interval (`vitscope.stats.intervals.share_interval`).
        shape_bias_high: Upper end.
        shape_decisions: Number of images answered with their shape's class.
        texture_decisions: Number answered with their texture's class.
        other_decisions: Number answered with a third class.
        shape_bias_of_shape: (n_classes,) the bias on images of each shape; NaN without a decision for either.
        n_conflicts: Number of images whose shape and texture differ; others are left out.
        level: Coverage of the interval.
        n_images: Number of images in the probe.
        card: Conditions of the measurement.
    """

    shape_bias: float
    shape_bias_low: float
    shape_bias_high: float
    shape_decisions: int
    texture_decisions: int
    other_decisions: int
    shape_bias_of_shape: np.ndarray
    n_conflicts: int
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the bias with its interval and the share of images decided either way."""
        decided = self.shape_decisions + self.texture_decisions
        return {
            "shape_bias": self.shape_bias,
            "shape_bias_low": self.shape_bias_low,
            "shape_bias_high": self.shape_bias_high,
            "decided": decided / self.n_conflicts,
        }


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a pass over all images, and one with an image that tells the number of classes."""
    works = [
        evaluations(workload, {}, Count.exactly(1)),
        Work(EVALUATION, Count.exactly(1), 1, is_divided=False),
        *guard_checks(workload),
    ]
    return MeasureCost(works)


@declares_cost(_cost)
@record_options
def shape_bias(
    probe: Probe, *, texture: Sequence[int] | None = None, level: OpenUnitInterval = 0.95
) -> ShapeBiasResult:
    """Measure how often a model follows shape where shape and texture disagree.

    Args:
        probe: Model and images; targets are the shapes' classes (``data=shapes``, split ``cue_conflict``).
        texture: (n_images,) class of each image's texture in the order of the batches; ``probe.about["texture"]`` by default.
        level: Coverage of the interval, which is that of a share of independent decisions.

    Raises:
        ValueError: Textures that are missing or not one per image, no conflicting image, a level outside (0, 1), or another
            loss than the cross entropy.
    """
    check_classes(probe, "shape_bias")
    check_level(level)
    texture = texture if texture is not None else probe.about.get("texture")
    if texture is None:
        raise ValueError(
            "Expected texture=(n_images,) classes or probe.about['texture'], received none: use data=shapes with the split "
            "cue_conflict."
        )
    textures = torch.as_tensor(np.asarray(texture)).long()
    if textures.shape != (probe.n_images,):
        raise ValueError(f"Expected one texture for each of {probe.n_images} images, received {tuple(textures.shape)}.")
    counts = _counts(probe, textures).cpu().numpy().astype(int)  # (n_classes, 4)
    shape, texture_count, other, invalid = (int(n) for n in counts.sum(0))
    if counts.sum() == 0:
        raise ValueError("Expected images whose shape and texture differ, received none: use the split cue_conflict.")
    reasons = {f"{invalid} answers": "logits are not finite"} if invalid else {}
    if shape + texture_count == 0:
        reasons["shape_bias"] = "no image was answered with its shape or its texture"
    warn_nulls("shape_bias", reasons)
    decided = counts[:, 0] + counts[:, 1]
    low, high = map(float, share_interval(shape, shape + texture_count, level))
    return ShapeBiasResult(
        shape_bias=shape / (shape + texture_count) if shape + texture_count else float("nan"),
        shape_bias_low=low,
        shape_bias_high=high,
        shape_decisions=shape,
        texture_decisions=texture_count,
        other_decisions=other,
        shape_bias_of_shape=np.where(decided > 0, counts[:, 0], np.nan) / np.maximum(decided, 1),
        n_conflicts=int(counts.sum()),
        level=level,
        n_images=probe.n_images,
        card=probe.card(),
    )


def _counts(probe: Probe, textures: torch.Tensor) -> torch.Tensor:
    """Return, over all ranks, how often each shape was answered by shape, by texture, by neither, by no number."""
    starts = np.cumsum([0, *(len(x) for x, _ in probe.batches)])
    # a rank without a batch of its own needs the number of classes too
    n_classes = _n_classes(probe)
    counts = torch.zeros(n_classes, 4, dtype=torch.float64, device=probe.device)
    with probe.guard() as model, failing_together():
        for index, (x, y) in track(probe.local_batches(), "shape bias", -(-probe.n_batches // world_size())):
            logits = model(x)
            shape, answer = hard_targets(y), logits.argmax(1)
            texture = textures[starts[index] : starts[index] + len(x)].to(answer)
            conflict = (shape != texture) & labeled(y)
            kind = torch.where(answer == shape, 0, torch.where(answer == texture, 1, 2))
            kind = torch.where(logits.isfinite().all(1), kind, 3)
            counts.index_put_((shape[conflict], kind[conflict]), torch.ones_like(counts[:1, 0]), accumulate=True)
    return all_reduce_sum(counts)


def _n_classes(probe: Probe) -> int:
    with probe.guard() as model:
        x, _ = next(probe.iter_batches())
        return int(model(x[:1]).shape[1])
