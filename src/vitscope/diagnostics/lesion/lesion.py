"""Loss of accuracy when one part of a trained model is removed, without retraining (Figs 10b and D.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.losses.requirements import check_image_losses
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import UNIT_COORDINATES, Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.running_mean import RunningMean, check_any_image, estimates
from vitscope.core.undefined_values import warn_nulls
from vitscope.core.weight_space import BN_POLICIES, BatchNormPolicy
from vitscope.diagnostics.lesion._ablated_forward import batch_by_batch, lesion_by_lesion
from vitscope.diagnostics.lesion._cost import chosen_lesions, chosen_units, lesion_cost
from vitscope.diagnostics.lesion._lesions import Lesion, check_removals
from vitscope.models.structure.residual_units import Unit
from vitscope.runtime.distributed import failing_together
from vitscope.stats.intervals import Estimate, few_images, where_enough_wrong

#: removal -> what its fields begin with
PREFIXES = {"branch_zero": "", "conv3x3_identity": "identity_", "stage": "stage_", "head": "head_"}


@dataclass(frozen=True)
class LesionResult(
    Result, coordinates=UNIT_COORDINATES | {"unit": ("units", "identity_units", "stage_units", "head_units")}
):
    """Changes are lesioned minus whole, over the same images: a part that matters has a negative change of accuracy.

    Half widths belong to 95% t-intervals over images, paired. The fields that begin with ``identity_``, ``stage_`` and
    ``head_`` are those of the other removals, empty where not asked for or not there.

    Attributes:
        units: (n_units,) names of the removed branches (``branch_zero``), by depth.
        kinds: (n_units,) ``conv``, ``msa``, ``mlp`` or ``pool``.
        stages: (n_units,) from 1.
        depths: (n_units,) from 0 to 1.
        accuracy_change: (n_units,) in [-1, 1].
        accuracy_half_width: (n_units,); NaN where fewer than 10 answers change.
        nll_change: (n_units,) nats.
        nll_half_width: (n_units,); NaN with fewer than 128 images, or where fewer than 10 are answered wrong before or after.
        identity_units: (n_identity_units,) names of the units whose 3x3 convolution became an identity (``conv3x3_identity``).
        identity_accuracy_change: (n_identity_units,) in [-1, 1].
        identity_accuracy_half_width: (n_identity_units,) see ``accuracy_half_width``.
        identity_nll_change: (n_identity_units,) see ``nll_change``.
        identity_nll_half_width: (n_identity_units,) see ``nll_half_width``.
        stage_units: (n_stage_units,) names such as ``stage 1 msa``: all branches of a kind in a stage at once.
        stage_accuracy_change: (n_stage_units,) in [-1, 1].
        stage_accuracy_half_width: (n_stage_units,) see ``accuracy_half_width``.
        stage_nll_change: (n_stage_units,) see ``nll_change``.
        stage_nll_half_width: (n_stage_units,) see ``nll_half_width``.
        head_units: (n_head_units,) names such as ``blocks.1.attn head 0``: single attention heads.
        head_accuracy_change: (n_head_units,) in [-1, 1].
        head_accuracy_half_width: (n_head_units,) see ``accuracy_half_width``.
        head_nll_change: (n_head_units,) see ``nll_change``.
        head_nll_half_width: (n_head_units,) see ``nll_half_width``.
        accuracy: Accuracy of the whole model.
        nll: NLL of the whole model, in nats.
        n_images: Images measured.
        bn: ``eval`` or ``recalibrate``.
        card: Conditions of the measurement.
    """

    units: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    accuracy_change: np.ndarray
    accuracy_half_width: np.ndarray
    nll_change: np.ndarray
    nll_half_width: np.ndarray
    identity_units: tuple[str, ...]
    identity_accuracy_change: np.ndarray
    identity_accuracy_half_width: np.ndarray
    identity_nll_change: np.ndarray
    identity_nll_half_width: np.ndarray
    stage_units: tuple[str, ...]
    stage_accuracy_change: np.ndarray
    stage_accuracy_half_width: np.ndarray
    stage_nll_change: np.ndarray
    stage_nll_half_width: np.ndarray
    head_units: tuple[str, ...]
    head_accuracy_change: np.ndarray
    head_accuracy_half_width: np.ndarray
    head_nll_change: np.ndarray
    head_nll_half_width: np.ndarray
    accuracy: float
    nll: float
    n_images: int
    bn: str
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the mean change by kind, the number of stages, and what the last MSA of a stage adds over the stage's others."""
        scalars = {"accuracy": self.accuracy, "nll": self.nll, "n_stages": float(len(np.unique(self.stages)))}
        for kind in sorted(set(self.kinds)):
            of_kind = np.array([k == kind for k in self.kinds])
            scalars[f"{kind}_accuracy_change"] = float(self.accuracy_change[of_kind].mean())
            scalars[f"{kind}_nll_change"] = float(self.nll_change[of_kind].mean())
        excess = []
        for stage in np.unique(self.stages):
            nll = self.nll_change[[k == "msa" and s == stage for k, s in zip(self.kinds, self.stages)]]
            excess += [nll[-1] - nll[:-1].mean()] if len(nll) > 1 else []
        return scalars | ({"stage_end_msa_nll_excess": float(np.mean(excess))} if excess else {})


@declares_cost(lesion_cost)
@record_options
@checks_options(check_removals)
def lesion(
    probe: Probe,
    *,
    removals: Sequence[str] = ("branch_zero", "conv3x3_identity", "stage"),
    bn: BatchNormPolicy = "eval",
    cache: bool = True,
    units: Sequence[Unit] | None = None,
    partial: ResumableRows | None = None,
) -> LesionResult:
    """Remove one part at a time from the trained model and measure what accuracy and likelihood lose.

    ``branch_zero`` lets a residual branch add nothing, shortcut and downsampling kept; ``conv3x3_identity``, the paper's
    for ResNet, replaces the 3x3 convolution of a block by ``x[::s, ::s]``; ``stage`` removes all MSA or all MLP of a
    stage; ``head`` single heads. Source: Park and Kim (2022), Fig 10b; docs/definitions.md section 7.

    Args:
        probe: Model and images.
        removals: Ways of removing parts, some of the four above; ``branch_zero`` is always among them.
        bn: ``eval`` keeps BatchNorm's running statistics; ``recalibrate`` recomputes them for each lesion, and for the
            whole model, as the average over the probe's batches.
        cache: Start each lesioned pass at the block it changes, from the activations of a whole pass, where the first batch
            shows that this gives the logits of full passes bit for bit; else a warning says that full passes are made. Off
            with ``recalibrate``, where the statistics before the block change as well, and for a single batch.
        units: The residual units, for a model that `vitscope.models.structure.residual_units.units` does not know.
        partial: Finished batches, see `vitscope.core.weight_space`.

    Raises:
        ValueError: An unknown removal or BatchNorm policy, a model without residual units, or a unit that does not run.
    """
    check_image_losses(probe, "lesion")
    if bn not in BN_POLICIES:
        raise ValueError(f"Expected bn to be one of {', '.join(BN_POLICIES)}, received {bn!r}.")
    units = chosen_units(probe, units)
    selected_lesions = chosen_lesions(units, removals)
    one_answer = probe.objective.loss != "dense_cross_entropy"  # for each image; else a share of its pixels
    totals = _Totals(one_answer)
    with probe.guard() as model:
        if bn == "recalibrate":
            rows = lesion_by_lesion(probe, model, selected_lesions)
        else:
            rows = batch_by_batch(probe, model, units if cache else [], selected_lesions, partial)
        with failing_together():
            for losses, correct in rows:
                totals.add(losses, correct)
    check_any_image(totals.losses)
    nll, accuracy, either_wrong = estimates([totals.losses, totals.correct, totals.wrong])
    if one_answer and not np.isnan(accuracy.mean[0]):
        half_width = where_enough_wrong(nll.half_width, either_wrong.mean * nll.count)
        nll = Estimate(nll.mean, half_width, nll.count)
    reasons = few_images(nll.count)
    if np.isnan(accuracy.mean[0]) and np.isfinite(nll.mean[0]):
        reasons |= {"accuracy": "targets are no classes"}
    warn_nulls("lesion", reasons)
    first_units = [c.first for c in selected_lesions if c.removal == "branch_zero"]
    return LesionResult(
        **_fields(selected_lesions, nll, accuracy),
        kinds=tuple(unit.kind for unit in first_units),
        stages=np.array([unit.stage for unit in first_units]),
        depths=np.array([unit.depth for unit in first_units]),
        accuracy=float(accuracy.mean[0]),
        nll=float(nll.mean[0]),
        n_images=nll.count,
        bn=bn,
        card=probe.card(bn_policy=bn),
    )


class _Totals:
    """Sums over images: the whole model's value, then the change by each lesion.

    Attributes:
        losses: (1 + n_lesions,) of each image.
        correct: (1 + n_lesions,) likewise.
        wrong: (1 + n_lesions,) whether the answer before or after a lesion is wrong.
    """

    def __init__(self, one_answer: bool) -> None:
        self.losses = RunningMean()
        self.correct, self.wrong = RunningMean(answers=one_answer), RunningMean(answers=one_answer)

    def add(self, losses: np.ndarray, correct: np.ndarray) -> None:
        """Add the values of a batch, ``(1 + n_lesions, B)`` each."""
        for total, values in ((self.losses, losses), (self.correct, correct)):
            values = torch.from_numpy(values.astype(np.float64))
            total.add(torch.cat([values[:1], values[1:] - values[:1]]).T)
        is_right = torch.from_numpy(correct.astype(np.float64))
        self.wrong.add(1 - (is_right * is_right[:1]).T)


def _fields(selected_lesions: Sequence[Lesion], nll: Estimate, accuracy: Estimate) -> dict[str, Any]:
    reason = "its loss is not finite"
    warn_nulls(
        "lesion",
        {f"{c.name}, {c.removal}": reason for c, x in zip(selected_lesions, nll.mean[1:]) if not np.isfinite(x)},
    )
    fields: dict[str, Any] = {}
    for removal, prefix in PREFIXES.items():
        index = [i for i, c in enumerate(selected_lesions, start=1) if c.removal == removal]  # 0 is the whole model
        fields[f"{prefix}units"] = tuple(selected_lesions[i - 1].name for i in index)
        for name, estimate in (("accuracy", accuracy), ("nll", nll)):
            fields[f"{prefix}{name}_change"] = estimate.mean[index]
            fields[f"{prefix}{name}_half_width"] = estimate.half_width[index]
    return fields
