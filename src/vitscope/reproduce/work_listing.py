"""List what targets need without doing it: their runs, which of them exist, and the estimated time and disk space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitscope.reproduce.cost_estimates import Estimate, Rates, estimate
from vitscope.reproduce.plan import Target, Trial
from vitscope.reproduce.planned_work import EXISTS, MEASURE, RESUME, TRAIN, PlannedTrial
from vitscope.runtime.text_layout import aligned, duration_text, size_text
from vitscope.sweep.job_scheduler import side_by_side_seconds

#: names of missing results that a line shows
_MOST_RESULTS = 3


def listing(targets: Sequence[Target], planned: Mapping[Trial, PlannedTrial], rates: Rates, n_slots: int) -> str:
    """Return the runs of each target, a table of the targets and the sums.

    Args:
        targets: Targets in the order in which they are made.
        planned: What exists of each of their trials.
        rates: Rates for the estimates.
        n_slots: Number of jobs side by side.
    """
    lines: list[str] = []
    rows: list[tuple[str, ...]] = [("target", "runs", *_STATES.values(), "time", "disk")]
    for target in targets:
        trials = [planned[trial] for trial in target.trials]
        costs = estimate(trials, rates)
        lines += [f"{target.name}", *_run_lines(trials, costs), ""]
        rows.append(_row(target.name, trials, _total(costs)))
    every = [planned[trial] for trial in dict.fromkeys(trial for target in targets for trial in target.trials)]
    costs = estimate(every, rates)
    total = _total(costs)
    if len(targets) > 1:
        rows.append(_row("together", every, total))
    return "\n".join(
        [*lines, *aligned(rows, right=range(1, len(rows[0]))), "", *_remarks(costs, every, n_slots, len(targets))]
    )


def start_text(planned: Sequence[PlannedTrial], costs: Sequence[Estimate], n_slots: int) -> str:
    """Return in a line what is about to be done, how long it takes, and where that number is from.

    Args:
        planned: Trials in the order of their start.
        costs: Their estimates, see `vitscope.reproduce.cost_estimates.estimate`.
        n_slots: Number of jobs side by side.
    """
    n_trainings = len({p.identity for p in planned if p.state in (TRAIN, RESUME)})
    n_measured = sum(p.state == MEASURE for p in planned)
    total = _total(costs)
    text = (
        f"to do: {n_trainings} trainings, {n_measured} finished runs to measure; one job at a time: {time_text(total)}"
    )
    if n_slots > 1 and total.seconds and not total.unknown_time:
        side_by_side = duration_text(side_by_side_seconds([cost.seconds for cost in costs], n_slots))
        text += f", {n_slots} side by side: at least {side_by_side}"
    return text + (f" (by {'; '.join(sorted(total.sources))})" if total.sources else "")


_STATES = {EXISTS: "exist", MEASURE: "to measure", RESUME: "to resume", TRAIN: "to train"}


def time_text(cost: Estimate) -> str:
    """Return the time of an estimate, in hours from 100 minutes on; ``unknown`` where a part of it is."""
    text = duration_text(round(cost.seconds))
    if not cost.unknown_time:
        return text
    return "unknown" if not cost.seconds else f"{text} + unknown ({cost.unknown_time})"


def disk_text(cost: Estimate) -> str:
    """Return the disk space of an estimate; ``unknown`` where that of a run is."""
    if not cost.unknown_size:
        return size_text(cost.size)
    return "unknown" if not cost.size else f"{size_text(cost.size)} + unknown ({cost.unknown_size})"


def _total(costs: Sequence[Estimate]) -> Estimate:
    return sum(costs, Estimate())


def _row(name: str, trials: Sequence[PlannedTrial], cost: Estimate) -> tuple[str, ...]:
    identities = {state: {p.identity for p in trials if p.state == state} for state in _STATES}
    n_measured = sum(p.state == MEASURE for p in trials)
    counts = [str(n_measured if state == MEASURE else len(identities[state])) for state in _STATES]
    return (name, str(len(trials)), *counts, time_text(cost), disk_text(cost))


def _run_lines(trials: Sequence[PlannedTrial], costs: Sequence[Estimate]) -> list[str]:
    common = set.intersection(*(set(p.trial.overrides) for p in trials)) if len(trials) > 1 else set()
    rows = []
    for planned, cost in zip(trials, costs):
        overrides = [o for o in planned.trial.overrides if o not in common or o.startswith(("model=", "seed="))]
        name = " ".join(o for o in overrides if not o.startswith("profile="))
        if planned.state == EXISTS:
            rows.append((planned.state, name, str(planned.run.id if planned.run else ""), ""))
            continue
        shared = "" if cost != Estimate() else "with another run above"
        rows.append((planned.state, name, shared or time_text(cost), _missing_text(planned)))
    return ["  " + line for line in aligned(rows)]


def _missing_text(planned: PlannedTrial) -> str:
    """Return the results that a finished run lacks."""
    if planned.state != MEASURE:
        return ""
    names = [f"{m.analysis} at {m.tag}" for m in planned.missing]
    more = f" and {len(names) - _MOST_RESULTS} more" if len(names) > _MOST_RESULTS else ""
    return ", ".join(names[:_MOST_RESULTS]) + more


def _remarks(costs: Sequence[Estimate], trials: Sequence[PlannedTrial], n_slots: int, n_targets: int) -> list[str]:
    total, lines = _total(costs), []
    if n_targets > 1:
        lines.append("Runs that targets share are trained once: the last row counts them once.")
    if n_slots > 1 and total.seconds and not total.unknown_time:
        side_by_side = duration_text(side_by_side_seconds([cost.seconds for cost in costs], n_slots))
        lines.append(
            f"time: of one job at a time; with {n_slots} side by side, each as fast as alone, at least {side_by_side}"
        )
    lines += [f"time: by {source}" for source in sorted(total.sources)]
    if total.unknown_time:
        lines += [
            "time: unknown where no finished run has the same model, batch and trainer, or no result the same settings,",
            "      and conf/reproduce.yaml states no rate; a short run measures them: overrides='trainer.max_epochs=1'",
        ]
    if any(planned.state in (TRAIN, RESUME) for planned in trials):
        lines.append(
            "disk: of finished runs of the same kind, else of the checkpoints by the model's number of parameters"
        )
    return lines
