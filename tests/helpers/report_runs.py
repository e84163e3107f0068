"""Run folders with chosen numbers, for tests of reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vitscope.core.objective_card import ObjectiveCard
from vitscope.diagnostics.evaluation.evaluation import EvaluationResult
from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import HessianMaxEigenvalueSpectrumResult
from vitscope.diagnostics.landscape.loss_slice import LossSliceResult
from vitscope.diagnostics.landscape.sharpness import SharpnessResult
from vitscope.reports import run_index
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.model_costs import Cost, Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.value_lookup import Selection
from vitscope.runs import result_store, run_search
from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run

CARD = ObjectiveCard(
    loss="cross entropy", l2="half_sq", weight_decay=0.05, data="photos", split="train", augmentation="crop_flip",
    n_images=32, batch_size=16, seed=0, checkpoint="0" * 16, epoch=2, options={},
)  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "alternet": {"_target_": "vitscope.models.alternet", "depth": 18, "window_size": 4, "n_msa": None, "mixer": "msa",
                 "placement": "stage_end"},
    "convnet": {"_target_": "vitscope.models.convnet", "depth": 18, "stem": "cifar"},
    "vit": {"_target_": "vitscope.models.vit", "size": "tiny", "patch_size": 8, "depth": 1},
    "convit": {"_target_": "vitscope.models.convit", "size": "tiny", "patch_size": 4, "kernel_size": 3},
    "pit": {"_target_": "vitscope.models.pit", "size": "tiny", "patch_size": 4},
    "swin": {"_target_": "vitscope.models.swin", "size": "tiny", "patch_size": 2},
}  # fmt: skip


def configuration(model: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Return a resolved configuration; changes are dotted keys with ``__`` for the dot."""
    cfg = {
        "seed": seed,
        "model": {**MODELS[model], "num_classes": 16, "image_size": 32, "in_chans": 3},
        "data": {"name": "photos", "image_size": 32, "num_classes": 16, "fraction": 1.0, "seed": seed, "root": "data"},
        "objective": {"augment": "crop_flip", "weight_decay": 0.05, "l2": "half_sq"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
        "trainer": {"max_epochs": 3, "max_steps": -1, "devices": 1},
        "callbacks": {},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node: Any = cfg
        for part in path:
            node = node[part]
        node[last] = value
    return cfg


def spectrum(nep: float = 0.1, ape: float = 100.0, card: ObjectiveCard = CARD) -> HessianMaxEigenvalueSpectrumResult:
    """Return a spectrum with those statistics."""
    values = np.array([[ape, -1.0], [ape, 1.0]])
    nan = float("nan")
    fields = dict.fromkeys(("residuals", "errors", "l2_contribution"), np.zeros((2, 2)))
    return HessianMaxEigenvalueSpectrumResult(
        **fields, eigenvalues=values, converged=np.ones((2, 2), bool), n_products=np.array([5, 5]),
        largest=np.zeros((2, 0)), smallest=np.zeros((2, 0)), batches=np.arange(2), negative_eigenvalue_proportion=nep,
        negative_eigenvalue_proportion_interval=np.array([nan, nan]), average_positive_eigenvalue=ape,
        average_positive_eigenvalue_interval=np.array([nan, nan]), near_zero_proportion=0.0,
        top1_negative_eigenvalue_proportion=nep, top1_average_positive_eigenvalue=ape, smallest_negative_proportion=nan,
        largest_average=nan, grid=np.linspace(-5, 1.2 * ape, 40), density=np.linspace(0, 1, 40), card=card,
    )  # fmt: skip


def curve(card: ObjectiveCard = CARD, depth: float = 1.0) -> LossSliceResult:
    """Return the slice of a parabola."""
    x = np.linspace(-1, 1, 5)
    y = depth * x**2 + 0.5
    return LossSliceResult(
        x=x, nll=y, nll_low=y - 0.1, nll_high=y + 0.1, l2_half_sq=x**2, l2_sum_norm=np.abs(x), accuracy=1 - x**2,
        ece=0 * x, nll_by_direction=np.stack([y, y]), accuracy_by_direction=np.stack([x, x]), directions="random",
        normalization="filter", direction_norms=np.ones(2), n_nonfinite=0, card=card,
    )  # fmt: skip


def rise(value: float, nll: float = 1.0, card: ObjectiveCard = CARD) -> SharpnessResult:
    """Return a sharpness of ``value`` at radius 0.1."""
    one = np.array([value])
    return SharpnessResult(
        radii=np.array([0.1]), rise=one, rise_low=one, rise_high=one, rise_by_pair=one[:, None],
        l2_half_sq_rise_by_pair=one[:, None], l2_sum_norm_rise_by_pair=one[:, None], accuracy=one,
        saturated=np.array([False]), worst_rise=one, worst_rise_by_start=one[:, None], nll_center=nll,
        accuracy_center=0.5, n_nonfinite=0, card=card,
    )  # fmt: skip


def evaluation(accuracy: float) -> EvaluationResult:
    """Return an evaluation of 100 test images."""
    half = np.array([accuracy, accuracy])
    return EvaluationResult(
        accuracy=accuracy, accuracy_top5=1.0, accuracy_lower=accuracy - 0.1, accuracy_upper=accuracy + 0.1,
        mean_class_accuracy=accuracy, nll=1.5, classes=np.arange(2), class_names=("a", "b"),
        class_count=np.array([50, 50]), class_accuracy=half, n_logits=2, n_images=100,
        card=dataclasses.replace(CARD, split="test", augmentation="none"),
    )  # fmt: skip


def write_run(
    root: Path,
    model: str,
    seed: int = 0,
    *,
    measured: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    name: str | None = None,
    **changes: Any,
) -> Run:
    """Write a run folder.

    Args:
        root: where.
        model: of `MODELS`.
        seed: of the run.
        measured: results by ``analysis`` or ``analysis@tag``; a text is the reason of a failure.
        metrics: of the last row; test accuracy, NLL and ECE by default.
        facts: changes of the provenance.
        name: of the folder.
        changes: of the configuration.
    """
    number = len(list(root.glob("*"))) if root.exists() else 0
    run = Run(root / (name or f"20260101-0000{number:02d}-{model}{seed}"))
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_text(yaml.safe_dump(configuration(model, seed, **changes)))
    created = f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}"
    size = {"parameters": 5_000_000, "flops": 10**9, "family": "", "why": ""}
    known = {"command": "train", "status": "finished", "seed": seed, "created": created, "model": size}
    provenance = {**known, **(facts or {})}
    (run.path / "provenance.json").write_text(json.dumps(provenance))
    journal = Journal(run.journal)
    for step in range(3):
        journal.append(
            step, step, {"val/accuracy": 0.3 + 0.1 * step, "val/nll": 2.0 - 0.3 * step, "train/loss": 2 - step}
        )
    last = {"test/accuracy": 0.5, "test/nll": 1.5, "test/ece": 0.05, "test/brier": 0.6} if metrics is None else metrics
    journal.append(3, 3, last)
    journal.close()
    for key, result in (measured or {}).items():
        analysis, _, tag = key.partition("@")
        folder, stem = run.results / analysis, f"{tag or 'end'}-0badcafe"
        if isinstance(result, str):
            folder.mkdir(parents=True, exist_ok=True)
            record = {"measure": "hessian_max_eigenvalue_spectrum", "error": result, "scalars": None}
            (folder / f"{stem}.json").write_text(json.dumps(record))
        else:
            result_store.save(folder, stem, result)
    return run


def other_card(**changes: Any) -> ObjectiveCard:
    """Return the card with some keys changed."""
    return dataclasses.replace(CARD, **changes)


class Given(Costs):
    """A cost for each family."""

    known: Mapping[str, Cost] = {"alternet": Cost(100, 1000), "convnet": Cost(104, 960), "preresnet": Cost(102, 1060)}

    def of(self, entry: Entry) -> Cost:
        return self.known.get(entry.family, Cost(10, 10))


def bench(root: Path) -> ReportRuns:
    return ReportRuns(Selection(run_index.collect(run_search.every(root / "runs"))), Given())
