"""Compare AlterNet with its controls: models of equal cost without attention, or another operation in place of attention."""

from __future__ import annotations

from collections.abc import Sequence

from vitscope.config.experiment_identity import setting
from vitscope.reports.claims.effect_sizes import (
    Effect,
    Reader,
    ReportRuns,
    Runs,
    balanced_effect,
    digest_without,
    logarithm_of,
    lowest_seed_run,
    option,
    paired_difference,
)
from vitscope.reports.run_entry import Entry

#: parameters and operations of matched models differ by at most this share
COST_TOLERANCE = 0.05

#: training losses of matched moments differ by at most this share
NLL_TOLERANCE = 0.1

#: models without attention that may serve as the matched control
PLAIN = ("convnet", "preresnet", "resnext")

#: measures that know the loss on training images at the moment they were made, best first
TRAIN_NLL = ("sharpness", "loss_slice", "loss_landscape")


def flattening(report_runs: ReportRuns, measure: str, scalar: str, *, control: str, matched: str, log: bool) -> Effect:
    """Return AlterNet minus its control in a measure of curvature, paired by seed.

    Args:
        report_runs: The runs.
        measure: Name of the measure.
        scalar: Name of the measure's scalar.
        control: ``cost`` for a model without attention whose parameters and operations are within 5%; or the ``mixer``
            that stands in attention's place: ``conv``, ``uniform``, ``blur``.
        matched: ``epoch`` compares at the end of equally long trainings; ``nll`` at the moments whose losses on training
            images are nearest, at most 10% apart.
        log: Whether to compare logarithms.
    """
    alternets = report_runs.groups(has_attention)
    pairs = [(runs, other) for runs in alternets if (other := _control(report_runs, runs, control)) is not None]
    lacking = "trained AlterNets" if not alternets else _missing_control(control)
    if not alternets or not pairs:
        return Effect(lacking=lacking)
    names = [f"{report_runs.describe(a)} − {report_runs.describe(b)}" for a, b in pairs]
    if matched == "epoch":
        read = report_runs.scalar(measure, scalar)
        parts = [paired_difference(a, b, logarithm_of(read) if log else read) for a, b in pairs]
    else:
        parts = [_at_matched_nll(report_runs, a, b, measure, scalar, log) for a, b in pairs]
    moments = "at the end" if matched == "epoch" else "at several epochs, with the training NLL (sharpness or slice)"
    return balanced_effect(parts, names, f"{measure} of both {moments}")


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


def _control(report_runs: ReportRuns, runs: Runs, control: str) -> Runs | None:
    if control == "cost":
        within = setting(lowest_seed_run(runs).config)
        candidates = [g for g in report_runs.groups(without_attention) if setting(lowest_seed_run(g).config) == within]
        gaps = [
            _relative_cost_difference(report_runs, lowest_seed_run(runs), lowest_seed_run(candidate))
            for candidate in candidates
        ]
        if not gaps or min(gaps) > COST_TOLERANCE:
            return None
        return candidates[gaps.index(min(gaps))]
    twins = report_runs.groups(lambda e: e.family == "alternet" and option(e, "mixer", "msa") == control)
    wanted_digest = digest_without(runs, "model.mixer", "model.blur_size")
    return next((g for g in twins if digest_without(g, "model.mixer", "model.blur_size") == wanted_digest), None)


def _relative_cost_difference(report_runs: ReportRuns, a: Entry, b: Entry) -> float:
    """Return the larger of the relative differences in parameters and in operations."""
    one, two = report_runs.costs.of(a), report_runs.costs.of(b)
    if one.parameters is None or two.parameters is None or not one.flops or not two.flops:
        return float("inf")
    return max(abs(two.parameters / one.parameters - 1), abs(two.flops / one.flops - 1))


def _missing_control(control: str) -> str:
    if control == "cost":
        return (
            f"a control without attention within {COST_TOLERANCE:.0%} of AlterNet's parameters and FLOPs, same setting"
        )
    return f"the same AlterNet with mixer={control}"


def train_nll(report_runs: ReportRuns, tag: str, measure: str) -> Reader:
    """Return a reader of the loss on training images at a moment, from one measure that knows it."""

    def read(entry: Entry) -> float | None:
        measured, _ = report_runs.selection.measured(entry, measure, tag)
        if measured is not None and measured.card is not None and measured.card.split == "train":
            return measured.scalars.get("nll_center")
        return None

    return read


def _at_matched_nll(
    report_runs: ReportRuns, a: Runs, b: Runs, measure: str, scalar: str, log: bool
) -> dict[int, float]:
    values: dict[int, float] = {}
    for seed in sorted(set(a) & set(b)):
        moments = _matched_tags(report_runs, a[seed], b[seed], measure)
        if moments is None:
            continue
        readers: list[Reader] = [report_runs.scalar(measure, scalar, tag) for tag in moments]
        if log:
            readers = [logarithm_of(read) for read in readers]
        first_value, second_value = readers[0](a[seed]), readers[1](b[seed])
        if first_value is not None and second_value is not None:
            values[seed] = first_value - second_value
    return values


def _matched_tags(report_runs: ReportRuns, a: Entry, b: Entry, measure: str) -> tuple[str, str] | None:
    """Return the latest moments of two runs at which their training losses agree.

    The run that ends with the higher loss is taken at its end, the other where its loss is nearest to that. Both losses are of
    one measure, the first of `TRAIN_NLL` that both runs have.
    """
    by_measure = (_losses_by_tag(report_runs, (a, b), measure, name) for name in TRAIN_NLL)
    losses = next(filter(None, by_measure), None)
    if losses is None:
        return None
    end = report_runs.selection.tag
    later_run = 0 if losses[0][end] >= losses[1][end] else 1
    target = losses[later_run][end]
    matched_tag = min(losses[1 - later_run], key=lambda tag: abs(losses[1 - later_run][tag] - target))
    if abs(losses[1 - later_run][matched_tag] - target) > NLL_TOLERANCE * abs(target):
        return None
    return (end, matched_tag) if later_run == 0 else (matched_tag, end)


def _losses_by_tag(
    report_runs: ReportRuns, runs: Sequence[Entry], measure: str, loss_measure: str
) -> list[dict[str, float]] | None:
    """Return each run's training losses by the moments of ``measure``, None where a run has none at the end."""
    losses = []
    for entry in runs:
        moments = [tag for tag in report_runs.selection.tags(entry, measure) if tag != "init"]
        readings = {tag: train_nll(report_runs, tag, loss_measure)(entry) for tag in moments}
        losses.append({tag: nll for tag, nll in readings.items() if nll is not None})
    return losses if all(report_runs.selection.tag in of_run for of_run in losses) else None
