"""Dependence of NEP and APE on settings that the paper does not state: k, batch size, tolerance and mixup."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F

from vitscope.core.batches.batch_inputs import joined
from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import EVALUATION
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective import labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.diagnostics.hessian import _nep_statistics
from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, batch_products, lanczos_products
from vitscope.linalg.solvers import solve
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Partial, Row, merge_rows, stored_row
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveInt


@dataclass(frozen=True)
class NepStabilityResult(Result, coordinates={"k": "k", "batch_size": "batch_size", "tol": "tol", "mixup": "mixup"}):
    """NEP and APE under one setting a row.

    Attributes:
        k: (n_settings,) eigenvalues pooled from each batch.
        batch_size: (n_settings,).
        tol: (n_settings,) relative error at which Lanczos stopped.
        mixup: (n_settings,) whether mixup was applied here.
        n_batches: (n_settings,).
        nep: (n_settings,) negative eigenvalue proportion.
        nep_interval: (n_settings, 2) 95 % over batches; NaN with fewer than 8 of them.
        ape: (n_settings,) average positive eigenvalue.
        ape_interval: (n_settings, 2), NaN with fewer than 4.
        n_products: Products in all.
        card: Conditions of the measurement; ``batch_size`` is the probe's.
    """

    k: np.ndarray
    batch_size: np.ndarray
    tol: np.ndarray
    mixup: np.ndarray
    n_batches: np.ndarray
    nep: np.ndarray
    nep_interval: np.ndarray
    ape: np.ndarray
    ape_interval: np.ndarray
    n_products: int = 0
    card: ObjectiveCard | None = field(default=None)

    def scalars(self) -> dict[str, float]:
        """Return what is logged: the range over all settings."""
        logged = {"nep_min": self.nep.min(), "nep_max": self.nep.max()}
        logged |= {"ape_min": np.min(self.ape), "ape_max": np.max(self.ape), "n_products": self.n_products}
        return {name: float(value) for name, value in logged.items() if np.isfinite(value)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the searches of each setting, batch after batch."""
    probe, base, k = workload.model_probe(), workload.batch_size, int(options["k"])
    ks, finest = {*options["ks"], k}, min(options["tols"])
    sizes: list[int] = [
        base,
        *(s for s in options["batch_sizes"] if s != base and s > 0 and s % base == 0 and s <= workload.n_images),
    ]
    sizes += [base] * sum(tol != finest for tol in options["tols"])
    is_mixed = bool(options["mixup"]) and _is_mixable(probe)
    if is_mixed:
        sizes.append(base)
    works, held = [], 0.0
    for number, size in enumerate(sizes):
        n_groups = workload.n_images // size
        joined_images = replace(workload, n_images=n_groups * size, batch_size=size)
        products = lanczos_products(joined_images, options, k if number else max(ks))
        cost = MeasureCost(batch_products(joined_images, options, products))
        works += (cost.measured() if number else cost).works
        held = max(held, basis_bytes(workload, products.expected))
    if is_mixed:  # the number of classes, for each batch
        works.append(Work(EVALUATION, Count.exactly(workload.n_images // base), base))
    n_settings = len(ks) + len(sizes) - 1
    # ten numbers of a setting and a flag of one byte
    return MeasureCost(works, held_bytes=held, result_bytes=n_settings * (10 * ENTRY + 1))


def _check(ks: Sequence[int], tols: Sequence[float], k: int) -> None:
    for name, values in (("ks", ks), ("tols", tols), ("k", [k])):
        if not len(values) or min(values) <= 0:
            raise ValueError(f"Expected {name} to hold positive numbers, received {list(values)}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
@curvature_arguments("parameters", "dtype", "bn", "max_products", "max_memory", "basis", "seed")
def nep_stability(
    probe: Probe,
    *,
    ks: Sequence[PositiveInt] = (1, 2, 5, 10, 20),
    batch_sizes: Sequence[PositiveInt] = (16, 32, 64, 128, 256),
    tols: Sequence[OpenUnitInterval] = (1e-1, 1e-2, 1e-3),
    mixup: bool = True,
    k: PositiveInt = 5,
    partial: ResumableRows | None = None,
    **curvature: Unpack[CurvatureArguments],
) -> NepStabilityResult:
    """Vary one choice at a time around the paper's (k = 5, the probe's batch size, tolerance 1e-3).

    All settings see the same images. Batches are joined from the probe's, so its batch size should be the smallest. The
    settings: every k from one run with the largest; every batch size; every tolerance; and, where the targets are class
    indices, batch-mode mixup (one lambda from Beta(1, 1) by the batch's number, partner = the batch flipped).

    Args:
        probe: The model, mini-batches and objective; batches are split over ranks.
        ks: Numbers of eigenvalues.
        batch_sizes: Multiples of the probe's batch size that do not exceed its images; others are left out.
        tols: Relative errors at which to stop.
        mixup: Whether to measure with mixup too.
        k: Eigenvalues where k is not what varies (``n_top`` is accepted too).
        partial: Rows already done.
        curvature: ``parameters``, ``dtype``, ``bn``, ``max_products``, ``max_memory``, ``basis``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: An empty or non-positive choice; and as `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Source: docs/definitions.md section 2.
    """
    base = probe.batch_size
    finest = min(tols)
    runs = [(base, max(*ks, k), finest, False)]
    runs += [(size, k, finest, False) for size in batch_sizes if size != base and _fits(size, probe)]
    runs += [(base, k, tol, False) for tol in tols if tol != finest]
    runs += [(base, k, finest, True)] if mixup and _is_mixable(probe) else []
    settings, products = [], 0
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options) as operators:
        for run in runs:
            rows = _rows(operators, run, partial)
            products += int(sum(row["n_products"] for row in rows))
            counts = sorted({*ks, k}) if run == runs[0] else [k]
            settings += [_setting(run, count, rows) for count in counts]
        card = operators.card({"solver": "lanczos", **options.values("max_products", "seed")}, mode="eval")
    table = {key: np.array([setting[key] for setting in settings]) for key in settings[0]}
    return NepStabilityResult(**table, n_products=products, card=card)


def _is_mixable(probe: Probe) -> bool:
    """Tell whether images and class indices can be mixed."""
    is_classes = probe.objective.loss == "cross_entropy" and next(iter(probe.batches))[1].ndim == 1
    return is_classes and probe.takes_images


def _fits(size: int, probe: Probe) -> bool:
    return size > 0 and size % probe.batch_size == 0 and size <= probe.n_images


def _rows(operators: Curvatures, run: tuple[int, int, float, bool], partial: Partial | None) -> list[Row]:
    size, k, tol, mixup = run
    memory, rows = operators.basis_memory(), {}
    with distributed.failing_together():
        for number, batch in track(_joined(operators.probe, size), f"batches of {size}"):
            key = f"size-{size}-k-{k}-tol-{tol:g}-mixup-{int(mixup)}-batch-{number:04d}"
            compute = functools.partial(_extreme_eigenvalues, operators, number, batch, k, tol, mixup, memory)
            rows[number] = stored_row(partial, key, compute)
    return [row for _, row in sorted(merge_rows(rows).items())]


def _extreme_eigenvalues(
    operators: Curvatures, number: int, batch: Batch, k: int, tol: float, mixup: bool, memory: BasisBuffer
) -> Row:
    """Return the row of one batch: its eigenvalues of largest magnitude ``(k,)``, their residuals, the products."""
    operator = operators.batch(number, _mixed(batch, number, operators) if mixup else batch)
    pairs = solve(operator, k=k, memory=memory, **{**operators.options.search(), "tol": tol}).pairs
    return {"values": pairs.values, "residuals": pairs.residuals, "n_products": float(pairs.n_products)}


def _joined(probe: Probe, size: int) -> Iterator[tuple[int, Batch]]:
    """Yield this rank's share of batches of ``size`` images, joined from the probe's; a shorter rest is dropped."""
    rank, world = distributed.rank(), distributed.world_size()
    held: list[Batch] = []
    number = 0
    for batch in probe.iter_batches():
        held.append(batch)
        if sum(len(x) for x, _ in held) < size:
            continue
        if number % world == rank:
            yield number, (joined([x for x, _ in held])[:size], torch.cat([y for _, y in held])[:size])
        held, number = [], number + 1


def _mixed(batch: Batch, number: int, operators: Curvatures) -> Batch:
    """Return the batch with mixup: one lambda, each image's partner at the mirrored place."""
    x, y = batch
    share = float(np.random.default_rng((operators.options.seed, number)).beta(1.0, 1.0))
    with torch.no_grad():
        n_classes = operators.model(x).shape[1]  # of all images: BatchNorm on batch statistics takes no single one
    if not bool(labeled(y).all()):
        raise ValueError(
            "Expected a label for every image with mixup=True, received ignored ones (-100): set mixup=False."
        )
    smoothing = operators.probe.objective.label_smoothing
    if smoothing > 0:
        raise ValueError(f"Expected label_smoothing=0 with mixup=True, received {smoothing}: set mixup=False.")
    targets = F.one_hot(y, n_classes).to(x.dtype)
    return share * x + (1 - share) * x.flip(0), share * targets + (1 - share) * targets.flip(0)


def _setting(run: tuple[int, int, float, bool], k: int, rows: list[Row]) -> dict[str, object]:
    size, _, tol, mixup = run
    values, residuals = (np.array([np.asarray(row[key])[:k] for row in rows]) for key in ("values", "residuals"))
    return {
        "k": k,
        "batch_size": size,
        "tol": tol,
        "mixup": mixup,
        "n_batches": len(rows),
        "nep": _nep_statistics.negative_proportion(values, residuals),
        "nep_interval": _nep_statistics.proportion_interval(values, residuals),
        "ape": _nep_statistics.positive_average(values, residuals),
        "ape_interval": _nep_statistics.average_interval(values, residuals),
    }
