"""Comparisons of AlterNet with its controls: the same cost without attention, or something else in attention's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitscope.config.experiment_identity import setting
from vitscope.reports.claims.effect_sizes import (
    Effect,
    Reader,
    ReportRuns,
    Runs,
    balanced,
    difference,
    first,
    log_of,
    option,
    same_but,
)
from vitscope.reports.run_index import Entry

#: parameters and operations of matched models differ by at most this share
COST_TOLERANCE = 0.05

#: training losses of matched moments differ by at most this share
NLL_TOLERANCE = 0.1

#: models without attention that may serve as the matched control
PLAIN = ("convnet", "preresnet", "resnext")

#: measures that know the loss on training images at the moment they were made, best first
TRAIN_NLL = ("sharpness", "loss_slice", "loss_landscape")


def flattening(bench: ReportRuns, measure: str, scalar: str, *, control: str, matched: str, log: bool) -> Effect:
    """Return AlterNet minus its control in a measure of curvature, paired by seed.

    Args:
        bench: the runs.
        measure: which.
        scalar: of the measure.
        control: ``cost`` for a model without attention whose parameters and operations are within 5%; or the ``mixer``
            that stands in attention's place: ``conv``, ``uniform``, ``blur``.
        matched: ``epoch`` compares at the end of equally long trainings; ``nll`` at the moments whose losses on training
            images are nearest, at most 10% apart.
        log: whether to compare logarithms.
    """
    alternets = bench.groups(has_attention)
    pairs = [(runs, other) for runs in alternets if (other := _control(bench, runs, control)) is not None]
    lacking = "trained AlterNets" if not alternets else _wanted(control)
    if not alternets or not pairs:
        return Effect(lacking=lacking)
    compared = "; ".join(f"{bench.said(a)} − {bench.said(b)}" for a, b in pairs)
    if matched == "epoch":
        read = bench.scalar(measure, scalar)
        parts = [difference(a, b, log_of(read) if log else read) for a, b in pairs]
    else:
        parts = [_at_matched_nll(bench, a, b, measure, scalar, log) for a, b in pairs]
    values = balanced(parts)
    moments = "at the end" if matched == "epoch" else "at several epochs, with the training NLL (sharpness or slice)"
    return Effect(values, compared, "" if values else f"{measure} of both {moments}")


def has_attention(entry: Entry) -> bool:
    """Whether a run's model is an AlterNet with attention in it."""
    n_msa = option(entry, "n_msa")
    return entry.family == "alternet" and option(entry, "mixer", "msa") == "msa" and (n_msa is None or any(n_msa))


def without_attention(entry: Entry) -> bool:
    """Whether a run's model is a convolutional network that may serve as the matched control."""
    if entry.family == "alternet":
        n_msa = option(entry, "n_msa")
        return option(entry, "mixer", "msa") == "conv" or (n_msa is not None and not any(n_msa))
    return entry.kin in PLAIN


def _control(bench: ReportRuns, runs: Runs, control: str) -> Runs | None:
    if control == "cost":
        within = setting(first(runs).config)
        found = [g for g in bench.groups(without_attention) if setting(first(g).config) == within]
        near = [(gap, i) for i, g in enumerate(found) if (gap := _gap(bench, first(runs), first(g))) <= COST_TOLERANCE]
        return found[min(near)[1]] if near else None
    twins = bench.groups(lambda e: e.family == "alternet" and option(e, "mixer", "msa") == control)
    own = same_but(runs, "model.mixer", "model.blur_size")
    return next((g for g in twins if same_but(g, "model.mixer", "model.blur_size") == own), None)


def _gap(bench: ReportRuns, a: Entry, b: Entry) -> float:
    """Return the larger of the relative differences in parameters and in operations."""
    one, two = bench.costs.of(a), bench.costs.of(b)
    if one.parameters is None or two.parameters is None or not one.flops or not two.flops:
        return float("inf")
    return max(abs(two.parameters / one.parameters - 1), abs(two.flops / one.flops - 1))


def _wanted(control: str) -> str:
    if control == "cost":
        return (
            f"a control without attention within {COST_TOLERANCE:.0%} of AlterNet's parameters and FLOPs, same setting"
        )
    return f"the same AlterNet with mixer={control}"


def train_nll(bench: ReportRuns, tag: str, measures: Sequence[str] = TRAIN_NLL) -> Reader:
    """Return a reader of the loss on training images at a moment, from the first of the measures that knows it."""

    def read(entry: Entry) -> float | None:
        for measure in measures:
            measured, _ = bench.selection.measured(entry, measure, tag)
            if measured is not None and measured.card is not None and measured.card.split == "train":
                return measured.scalars.get("nll_center")
        return None

    return read


def _at_matched_nll(bench: ReportRuns, a: Runs, b: Runs, measure: str, scalar: str, log: bool) -> dict[int, float]:
    values: dict[int, float] = {}
    for seed in sorted(set(a) & set(b)):
        moments = _matched_tags(bench, a[seed], b[seed], measure)
        if moments is None:
            continue
        readers: list[Callable[[Entry], float | None]] = [bench.scalar(measure, scalar, tag) for tag in moments]
        left, right = ((log_of(r) if log else r)(e) for r, e in zip(readers, (a[seed], b[seed])))
        if left is not None and right is not None:
            values[seed] = left - right
    return values


def _matched_tags(bench: ReportRuns, a: Entry, b: Entry, measure: str) -> tuple[str, str] | None:
    """Return the latest moments of two runs at which their training losses agree.

    The run that ends with the higher loss is taken at its end, the other where its loss is nearest to that.
    """
    losses = []
    for entry in (a, b):
        found = {tag: train_nll(bench, tag)(entry) for tag in bench.selection.tags(entry, measure) if tag != "init"}
        losses.append({tag: nll for tag, nll in found.items() if nll is not None})
    if any(bench.selection.tag not in found for found in losses):
        return None
    end = bench.selection.tag
    late = 0 if losses[0][end] >= losses[1][end] else 1
    target = losses[late][end]
    other = min(losses[1 - late], key=lambda tag: abs(losses[1 - late][tag] - target))
    if abs(losses[1 - late][other] - target) > NLL_TOLERANCE * abs(target):
        return None
    return (end, other) if late == 0 else (other, end)
