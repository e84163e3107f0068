"""Statistics of the paper's claims: trends, kinds of units, noise bands, placement, kernels, best models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitscope.reports.claims.effect_sizes import (
    Effect,
    Reader,
    ReportRuns,
    Runs,
    balanced_effect,
    by_setting,
    digest_without,
    is_family,
    longest_trend,
    lowest_seed_run,
    option,
    paired_difference,
    plainest,
)
from vitscope.reports.claims.matched_controls import has_attention, train_nll
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.headline_columns import SPECTRUM
from vitscope.runtime.errors import StorageError

NEP = (SPECTRUM, "negative_eigenvalue_proportion")

#: from weak to strong inductive bias; position in the list is the x of the trend
BIAS = ("vit", "pit", "swin", "convnet")

#: families whose blocks are all in one stage
SINGLE_STAGE = ("vit", "convit")

#: equal-parameter models differ by at most this share
EQUAL = 0.01


def bias_trend(report_runs: ReportRuns) -> Effect:
    """Return NEP's slope over ViT, PiT, Swin, ResNet: each family's plainest model, all in one setting."""
    chains: list[list[tuple[float, Runs]]] = []
    for groups in by_setting(report_runs.groups(is_family(*BIAS))).values():
        plainest_by_position = [
            (i, plainest([g for g in groups if lowest_seed_run(g).kin == name])) for i, name in enumerate(BIAS)
        ]
        chains.append([(float(i), runs) for i, runs in plainest_by_position if runs is not None])
    lacking = "ViT, PiT, Swin and ResNet in one setting, with hessian"
    return longest_trend(chains, report_runs.scalar(*NEP), -1, lacking, min_positions=4)


def kernel_trend(report_runs: ReportRuns) -> Effect:
    """Return NEP's slope over kernels 3, 5 (7) and global of local attention, all else equal."""
    # ranks: global has no width
    chains = [
        [(float(i), by_kernel[k]) for i, k in enumerate(sorted(by_kernel))] for by_kernel in _kernels(report_runs)
    ]
    lacking = "convit with kernel_size 3, 5 and global, with hessian"
    return longest_trend(chains, report_runs.scalar(*NEP), 1, lacking)


def kernel_difference(report_runs: ReportRuns, read: Reader, kernel: int, requirement: str) -> Effect:
    """Return the local model of that kernel minus the global one."""
    both = [by_kernel for by_kernel in _kernels(report_runs) if kernel in by_kernel and math.inf in by_kernel]
    if not both:
        return Effect(lacking=f"convit with kernel_size {kernel} and global")
    measured = [(paired_difference(by_kernel[kernel], by_kernel[math.inf], read), by_kernel) for by_kernel in both]
    values, by_kernel = max(measured, key=lambda pair: len(pair[0]))
    compared = f"{report_runs.describe(by_kernel[kernel])} − {report_runs.describe(by_kernel[math.inf])}"
    return Effect(values, compared, "" if values else f"{requirement} of both")


def _kernels(report_runs: ReportRuns) -> list[dict[float, Runs]]:
    """Return the experiments with local attention by the size of the kernel, infinite for global, of each setting.

    The settings with the most kernels are first, of equals those with the most runs.
    """
    chains: dict[str, dict[float, Runs]] = {}
    for runs in report_runs.groups(is_family("convit")):
        size = option(lowest_seed_run(runs), "kernel_size")
        chains.setdefault(digest_without(runs, "model.kernel_size"), {})[
            math.inf if size == "global" else float(size)
        ] = runs
    return sorted(chains.values(), key=lambda chain: (len(chain), sum(map(len, chain.values()))), reverse=True)


def data_trend(
    report_runs: ReportRuns, readers: Reader | Sequence[Reader], sign: int, *, fixed: str, requirement: str
) -> Effect:
    """Return the slope over the logarithm of the data fraction, all else equal.

    Args:
        report_runs: The runs.
        readers: Return the number of a run, None if it has none. Of several, the first with the most seeds is used for all runs.
        sign: Sign of the claimed slope.
        fixed: Length of training and of its warm-up that the compared runs share, ``epochs`` or ``steps``. A warm-up of some
            epochs is of fewer steps on less data: trainings of equal steps with such a one are not compared.
        requirement: Name of the analysis or metric that the number needs.
    """
    chains: dict[str, dict[float, Runs]] = {}
    for runs in report_runs.groups(is_family("vit")):
        cfg = lowest_seed_run(runs).config
        by_steps = ((cfg.get("trainer") or {}).get("max_steps") or -1) > 0
        fraction = float((cfg.get("data") or {}).get("fraction") or 1.0)
        if by_steps == (fixed == "steps") and not (by_steps and _has_warmup_in_epochs(cfg)):
            chains.setdefault(digest_without(runs, "data.fraction"), {})[math.log(fraction)] = runs
    limit = "trainer.max_epochs" if fixed == "epochs" else "trainer.max_steps and optimizer.schedule.warmup_steps"
    lacking = f"ViTs at three data.fraction and one {limit}, with {requirement}"
    effects = [
        longest_trend([list(chain.items()) for chain in chains.values()], read, sign, lacking)
        for read in (readers if isinstance(readers, Sequence) else [readers])
    ]
    return max(effects, key=lambda effect: len(effect.values))


def _has_warmup_in_epochs(cfg: Mapping[str, Any]) -> bool:
    """Tell whether a configuration's learning rate rises for a number of epochs, rather than of steps or not at all."""
    schedule = (cfg.get("optimizer") or {}).get("schedule") or {}
    return schedule.get("warmup_steps") is None and bool(schedule.get("warmup_epochs"))


def mean_by_kind(
    report_runs: ReportRuns, measure: str, scalar: str, keep: Callable[[Entry], bool] | None = None
) -> Effect:
    """Return a measure's scalar of one kind of unit: mean over the experiments that have it, see `balanced_effect`.

    AlterNets with something else in attention's place are controls and count for no kind.
    """
    read = report_runs.scalar(measure, scalar)
    parts, names = [], []
    for runs in report_runs.groups(lambda entry: option(entry, "mixer", "msa") == "msa"):
        readings = {seed: read(entry) for seed, entry in runs.items() if keep is None or keep(entry)}
        values = {seed: value for seed, value in readings.items() if value is not None}
        if values:
            parts.append(values)
            names.append(lowest_seed_run(runs).label)
    return balanced_effect(parts, names, f"{measure} of a model with {scalar}")


def has_stages(report_runs: ReportRuns, measure: str) -> Callable[[Entry], bool]:
    """Return a test of whether a run's model has several stages, which claims about stages are about.

    In a single stage its end is that of the network. The measure states the number of stages; of results without it, the
    families of one stage are left out, since older versions wrote a `block_structure` that compared the stem.
    """

    def keep(entry: Entry) -> bool:
        n_stages = report_runs.scalar(measure, "n_stages")(entry)
        return entry.kin not in SINGLE_STAGE if n_stages is None else n_stages > 1

    return keep


def has_initial_reference(report_runs: ReportRuns) -> Callable[[Entry], bool]:
    """Return a test of whether a run's branch transfer had the initial model's subtracted."""

    def keep(entry: Entry) -> bool:
        measured, _ = report_runs.selection.measured(entry, "branch_transfer")
        if measured is not None and "reference" in measured.texts:
            return measured.texts["reference"] == "initial"
        try:
            return measured is not None and measured.load().reference == "initial"
        except StorageError:
            return False

    return keep


def noise_interaction(report_runs: ReportRuns) -> Effect:
    """Return ViT minus ResNet of the drop in high bands minus the drop in low ones, over clean minus chance accuracy."""

    def read(entry: Entry) -> float | None:
        measured, _ = report_runs.selection.measured(entry, "frequency_noise_robustness")
        classes = (entry.config.get("data") or {}).get("num_classes")
        if measured is None or not classes:
            return None
        change, clean = (measured.scalars.get(k) for k in ("high_minus_low", "clean_accuracy"))
        official = measured.card is not None and measured.card.solver.get("construction") == "official"
        if change is None or clean is None or clean <= 1 / classes or official:
            return None
        return -change / (clean - 1 / classes)

    def measured_runs(groups: Sequence[Runs], name: str) -> Runs | None:
        return plainest([g for g in groups if lowest_seed_run(g).kin == name and any(map(is_measured, g.values()))])

    def is_measured(entry: Entry) -> bool:
        return any(m.measure == "frequency_noise_robustness" and not m.error for m in entry.results)

    best = Effect(lacking="a ViT and a ResNet in one setting, with frequency_noise (equal rms) and above chance")
    for groups in by_setting(report_runs.groups(is_family("vit", "convnet"))).values():
        vit, cnn = (measured_runs(groups, name) for name in ("vit", "convnet"))
        if vit is None or cnn is None:
            continue
        values = paired_difference(vit, cnn, read)
        if len(values) > len(best.values):  # of several settings the one with the most seeds
            best = Effect(values, f"{report_runs.describe(vit)} − {report_runs.describe(cnn)}")
    return best


def placement_difference(report_runs: ReportRuns) -> Effect:
    """Return test accuracy with attention at stage ends minus that elsewhere, at equal numbers of parameters."""
    differences, names = [], []
    groups = report_runs.groups(has_attention)
    at_stage_ends = [runs for runs in groups if _placement(runs) == "stage_end"]
    elsewhere = [runs for runs in groups if _placement(runs) in ("stage_start", "late", "alternating")]
    for runs, other in itertools.product(at_stage_ends, elsewhere):
        digests = {digest_without(one, "model.placement", "model.n_msa") for one in (runs, other)}
        if len(digests) == 1 and _have_equal_sizes(report_runs, runs, other):
            differences.append(paired_difference(runs, other, report_runs.metric("test/accuracy")))
            names.append(f"{report_runs.describe(runs)} − {report_runs.describe(other)}")
    return balanced_effect(differences, names, "AlterNets that differ in model.placement alone")


def _placement(runs: Runs) -> Any:
    return option(lowest_seed_run(runs), "placement", "stage_end")


def _have_equal_sizes(report_runs: ReportRuns, runs: Runs, other: Runs) -> bool:
    """Whether two models' numbers of parameters are known and agree to `EQUAL`."""
    size, other_size = (report_runs.costs.of(lowest_seed_run(one)).parameters for one in (runs, other))
    if not size or not other_size:
        return False
    return abs(other_size / size - 1) <= EQUAL


def training_nll(report_runs: ReportRuns) -> list[Reader]:
    """Return readers of the loss on training images at the tables' moment, one a measure, that of the slice first.

    Losses of two measures, over other images and other numbers of them, are never compared.
    """
    measures = ("loss_slice", "sharpness", "loss_landscape")
    return [train_nll(report_runs, report_runs.selection.tag, measure) for measure in measures]


def test_error(report_runs: ReportRuns) -> Reader:
    """Return a reader of one minus test accuracy."""
    read = report_runs.metric("test/accuracy")
    return lambda entry: None if (value := read(entry)) is None else 1 - value
