"""The other statistics of the paper's claims: trends, kinds of units, noise bands, placement, kernels, winners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vitscope.reports.claims.effect_sizes import (
    Effect,
    Reader,
    ReportRuns,
    Runs,
    balanced,
    by_setting,
    difference,
    first,
    is_family,
    option,
    plainest,
    same_but,
    trend,
)
from vitscope.reports.claims.matched_controls import has_attention, train_nll
from vitscope.reports.run_index import Entry
from vitscope.reports.tables.headline_tables import SPECTRUM
from vitscope.runtime.errors import StorageError

NEP = (SPECTRUM, "negative_eigenvalue_proportion")

#: from weak to strong inductive bias; position in the list is the x of the trend
BIAS = ("vit", "pit", "swin", "convnet")
CNNS = ("convnet", "preresnet", "resnext")

#: equal-parameter models differ by at most this share
EQUAL = 0.01


def bias_trend(bench: ReportRuns) -> Effect:
    """Return NEP's slope over ViT, PiT, Swin, ResNet: each family's plainest model, all in one setting."""
    best: list[tuple[float, Runs]] = []
    for groups in by_setting(bench.groups(is_family(*BIAS))).values():
        found = [(i, plainest([g for g in groups if first(g).kin == name])) for i, name in enumerate(BIAS)]
        ordered = [(float(i), runs) for i, runs in found if runs is not None]
        best = max(best, ordered, key=lambda o: (len(o), sum(len(runs) for _, runs in o)))
    return trend(best, bench.scalar(*NEP), -1, "ViT, PiT, Swin and ResNet in one setting, with hessian", least=4)


def kernel_trend(bench: ReportRuns) -> Effect:
    """Return NEP's slope over kernels 3, 5 (7) and global of local attention, all else equal."""
    return trend(_kernels(bench), bench.scalar(*NEP), 1, "convit with kernel_size 3, 5 and global, with hessian")


def kernel_difference(bench: ReportRuns, read: Reader, kernel: int, what: str) -> Effect:
    """Return the local model of that kernel minus the global one."""
    found = {option(first(runs), "kernel_size"): runs for _, runs in _kernels(bench)}
    if kernel not in found or "global" not in found:
        return Effect(lacking=f"convit with kernel_size {kernel} and global")
    values = difference(found[kernel], found["global"], read)
    compared = f"{bench.said(found[kernel])} − {bench.said(found['global'])}"
    return Effect(values, compared, "" if values else f"{what} of both")


def _kernels(bench: ReportRuns) -> list[tuple[float, Runs]]:
    chains: dict[str, dict[float, Runs]] = {}
    for runs in bench.groups(is_family("convit")):
        size = option(first(runs), "kernel_size")
        chains.setdefault(same_but(runs, "model.kernel_size"), {})[math.inf if size == "global" else float(size)] = runs
    longest = max(chains.values(), key=lambda c: (len(c), sum(map(len, c.values()))), default={})
    return [(float(i), runs) for i, (_, runs) in enumerate(sorted(longest.items()))]  # ranks: global has no width


def data_trend(bench: ReportRuns, read: Reader, sign: int, *, fixed: str, what: str) -> Effect:
    """Return the slope over the logarithm of the data fraction, all else equal.

    Args:
        bench: the runs.
        read: of each run.
        sign: of the claimed slope.
        fixed: ``epochs`` or ``steps``.
        what: is read, in words.
    """
    chains: dict[str, dict[float, Runs]] = {}
    for runs in bench.groups(is_family("vit")):
        cfg = first(runs).config
        by_steps = ((cfg.get("trainer") or {}).get("max_steps") or -1) > 0
        fraction = float((cfg.get("data") or {}).get("fraction") or 1.0)
        if by_steps == (fixed == "steps"):
            chains.setdefault(same_but(runs, "data.fraction"), {})[math.log(fraction)] = runs
    longest = max(chains.values(), key=lambda c: (len(c), sum(map(len, c.values()))), default={})
    limit = "trainer.max_epochs" if fixed == "epochs" else "trainer.max_steps"
    return trend(sorted(longest.items()), read, sign, f"ViTs at three data.fraction and one {limit}, with {what}")


def by_kind(bench: ReportRuns, measure: str, scalar: str, keep: Callable[[Entry], bool] | None = None) -> Effect:
    """Return a measure's scalar of one kind of unit: mean over the experiments that have it.

    AlterNets with something else in attention's place are controls and count for no kind.
    """
    read = bench.scalar(measure, scalar)
    parts, names = [], []
    for runs in bench.groups(lambda entry: option(entry, "mixer", "msa") == "msa"):
        found = {seed: read(entry) for seed, entry in runs.items() if keep is None or keep(entry)}
        values = {seed: value for seed, value in found.items() if value is not None}
        if values:
            parts.append(values)
            names.append(first(runs).label)
    return Effect(balanced(parts), ", ".join(names), "" if parts else f"{measure} of a model with {scalar}")


def minus_initial(bench: ReportRuns) -> Callable[[Entry], bool]:
    """Return a test of whether a run's branch transfer had the initial model's subtracted."""

    def keep(entry: Entry) -> bool:
        measured, _ = bench.selection.measured(entry, "branch_transfer")
        try:
            return measured is not None and measured.load().reference == "initial"
        except StorageError:
            return False

    return keep


def noise_interaction(bench: ReportRuns) -> Effect:
    """Return ViT minus ResNet of the drop in high bands minus the drop in low ones, over clean minus chance accuracy."""

    def read(entry: Entry) -> float | None:
        measured, _ = bench.selection.measured(entry, "frequency_noise_robustness")
        classes = (entry.config.get("data") or {}).get("num_classes")
        if measured is None or not classes:
            return None
        change, clean = (measured.scalars.get(k) for k in ("high_minus_low", "clean_accuracy"))
        official = measured.card is not None and measured.card.solver.get("construction") == "official"
        if change is None or clean is None or clean <= 1 / classes or official:
            return None
        return -change / (clean - 1 / classes)

    for groups in by_setting(bench.groups(is_family("vit", "convnet"))).values():
        vit, cnn = (plainest([g for g in groups if first(g).kin == name]) for name in ("vit", "convnet"))
        if vit and cnn and (values := difference(vit, cnn, read)):
            return Effect(values, f"{bench.said(vit)} − {bench.said(cnn)}")
    return Effect(lacking="a ViT and a ResNet in one setting, with frequency_noise (equal rms) and above chance")


def placement(bench: ReportRuns) -> Effect:
    """Return test accuracy with attention at stage ends minus that elsewhere, at equal numbers of parameters."""
    parts, names = [], []
    groups = bench.groups(has_attention)
    for runs in groups:
        if option(first(runs), "placement", "stage_end") != "stage_end":
            continue
        for other in groups:
            elsewhere = option(first(other), "placement", "stage_end") in ("stage_start", "late", "alternating")
            alike = same_but(runs, "model.placement", "model.n_msa") == same_but(
                other, "model.placement", "model.n_msa"
            )
            sizes = [bench.costs.of(first(g)).parameters for g in (runs, other)]
            if elsewhere and alike and all(sizes) and abs((sizes[1] or 0) / (sizes[0] or 1) - 1) <= EQUAL:
                parts.append(difference(runs, other, bench.metric("test/accuracy")))
                names.append(f"{bench.said(runs)} − {bench.said(other)}")
    values = balanced(parts)
    return Effect(values, "; ".join(names), "" if values else "AlterNets that differ in model.placement alone")


def winner(bench: ReportRuns, families: Sequence[str], read: Reader, what: str) -> Effect:
    """Return the best AlterNet minus the best model of other families, each chosen by its mean validation accuracy.

    Among those that have what is compared. Blocked where only one recipe was tried for a side: then it is not known to be
    at its best.
    """
    datasets: dict[str, list[Runs]] = {}
    for runs in bench.groups(lambda e: (has_attention(e) or e.kin in families) and read(e) is not None):
        datasets.setdefault(first(runs).data, []).append(runs)
    for groups in datasets.values():
        ours = [g for g in groups if has_attention(first(g))]
        theirs = [g for g in groups if first(g).kin in families]
        one, two = _best(bench, ours), _best(bench, theirs)
        if one and two and (values := difference(one, two, read)):
            tried = (_recipes(ours, one), _recipes(theirs, two))
            only = f"not each at its best recipe: {tried[0]} and {tried[1]} tried" if min(tried) < 2 else ""
            return Effect(values, f"{bench.said(one)} − {bench.said(two)}", blocked=only)
    return Effect(lacking=f"AlterNet and {' or '.join(families)} on one data set, with {what}")


def _best(bench: ReportRuns, groups: Sequence[Runs]) -> Runs | None:
    read = bench.metric("val/accuracy")

    def score(runs: Runs) -> float:
        values = [v for v in map(read, runs.values()) if v is not None]
        return sum(values) / len(values) if values else -math.inf

    return max(groups, key=score, default=None)


def _recipes(groups: Sequence[Runs], chosen: Runs) -> int:
    """Return in how many recipes the chosen model was trained."""
    model = first(chosen).config.get("model")
    return sum(1 for runs in groups if first(runs).config.get("model") == model)


def training_nll(bench: ReportRuns) -> Reader:
    """Return a reader of the loss on training images at the tables' moment, of the slice where a run has several."""
    return train_nll(bench, bench.selection.tag, ("loss_slice", "sharpness", "loss_landscape"))


def test_error(bench: ReportRuns) -> Reader:
    """Return a reader of one minus test accuracy."""
    read = bench.metric("test/accuracy")
    return lambda entry: None if (value := read(entry)) is None else 1 - value
