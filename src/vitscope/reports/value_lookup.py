"""Look up the number of a run for a measure, at one moment and under the conditions that the compared runs share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vitscope.core.objective_card import ObjectiveCard, shown_value
from vitscope.reports.measured_results import NAMED_BY_ROWS, OF_THE_RUN, Conditions, Measured, differing, majority
from vitscope.reports.run_entry import END, Entry

MISSING, FAILED = "missing", "failed"


@dataclass(frozen=True)
class Value:
    """A number of one run, or why there is none.

    Attributes:
        number: The number; None where there is none.
        problem: ``missing`` or ``failed``; empty for a number, and where the measure's definition gives none.
        why: Reason in words.
    """

    number: float | None
    problem: str = ""
    why: str = ""


@dataclass
class Selection:
    """Runs of a report, and their results that may be compared.

    Args:
        entries: Superseded ones are left out.
        tag: The moment that tables show.
        allow_different: Take results whose objective cards differ.
        or_newest: Take a run's newest result where it has none at ``tag``, as analyses of other checkpoints have.
        recorded_only: Leave out results whose conditions are not fully recorded: without a card, or without the measure's
            options, as older versions saved them. Two such results may differ in anything.
    """

    entries: Sequence[Entry]
    tag: str = END
    allow_different: bool = False
    or_newest: bool = False
    recorded_only: bool = False
    _conditions: dict[str, Conditions | None] = field(default_factory=dict, repr=False)
    _asked: dict[str, dict[str, Entry]] = field(default_factory=dict, repr=False)
    _by_analysis: dict[str, Conditions | None] = field(default_factory=dict, repr=False)
    _refused: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.entries = [entry for entry in self.entries if not entry.superseded]

    def groups(self, keep: Callable[[Entry], bool] = lambda _: True) -> dict[str, dict[int, Entry]]:
        """Return the runs of each experiment by seed, in the order of the entries; of analyses of one model the newest."""
        groups: dict[str, dict[int, Entry]] = {}
        for entry in filter(keep, self.entries):
            runs = groups.setdefault(entry.group, {})
            if entry.seed not in runs or _created(runs[entry.seed]) <= _created(entry):
                runs[entry.seed] = entry
        return groups

    def metric(self, entry: Entry, name: str) -> Value:
        """Return a metric's last value; of a run without metrics that of `vs.evaluation` on the same split."""
        if name not in entry.metrics:
            if not entry.trained and (result := self.evaluation(entry, name)) is not None:
                return scalar_of_result(result, name.partition("/")[2])
            return _missing(entry, "not in the journal")
        number = entry.metrics[name]
        if number is None or not math.isfinite(number):
            return Value(None, FAILED, "not finite")
        return Value(number)

    def evaluation(self, entry: Entry, metric: str) -> Measured | None:
        """Return the `vs.evaluation` of an analyzed model that stands for a metric such as ``test/accuracy``, if there is one.

        It is that of the tables' moment, under the conditions that most runs share, on the metric's split and over all classes.
        """
        split, _, name = metric.partition("/")
        result, _ = self.measured(entry, "evaluation")
        if result is None or result.card is None or result.card.split != split or name not in result.scalars:
            return None
        return result if (result.card.options or {}).get("classes", "all") == "all" else None

    def scalar(self, entry: Entry, measure: str, name: str, tag: str | None = None) -> Value:
        """Return a measure's scalar, at the tables' moment by default."""
        measured, no_value = self.measured(entry, measure, tag)
        if measured is None:
            return no_value
        return scalar_of_result(measured, name)

    def measured(self, entry: Entry, measure: str, tag: str | None = None) -> tuple[Measured | None, Value]:
        """Return the newest result of a measure under the shared conditions, or why there is none."""
        tag = self._tag_of(entry, None, measure) if tag is None else tag
        self._asked.setdefault(measure, {})[entry.id] = entry
        results = [m for m in entry.results if m.measure == measure and m.tag == tag]
        return self._of_shared(entry, results, self.conditions(measure), NAMED_BY_ROWS, tag)

    def of_analysis(self, entry: Entry, analysis: str) -> tuple[Measured | None, Value]:
        """Return the newest result of an analysis, at the tables' moment, under the conditions that most runs share.

        The objective and the data may differ: they are what a figure over a key of the configuration may vary.
        """
        if analysis not in self._by_analysis:
            results_by_run = {e.id: [m for m in e.results if m.analysis == analysis] for e in self.entries}
            self._by_analysis[analysis] = majority(results_by_run, OF_THE_RUN)
        tag = self._tag_of(entry, analysis, None)
        results = [m for m in entry.results if m.analysis == analysis and m.tag == tag]
        return self._of_shared(entry, results, self._by_analysis[analysis], OF_THE_RUN, tag)

    def _tag_of(self, entry: Entry, analysis: str | None, measure: str | None) -> str:
        """Return the moment at which a run's results are looked up."""
        return (self.or_newest and entry.newest_tag(analysis, measure)) or self.tag

    def _of_shared(
        self, entry: Entry, results: Sequence[Measured], shared: Conditions | None, without: Sequence[str], tag: str
    ) -> tuple[Measured | None, Value]:
        successes = [m for m in results if not m.error]
        if not successes:
            if results:
                return None, Value(None, FAILED, results[-1].error)
            return None, _missing(entry, f"not measured at {tag}")
        if self.recorded_only and not any(map(_is_recorded, successes)):
            reason = "measured under conditions that were not recorded: measure again"
            self._refused.append(f"{successes[-1].measure} {reason}")
            return None, Value(None, MISSING, reason)
        if self.recorded_only:
            successes = [m for m in successes if _is_recorded(m)]
        comparable = [m for m in successes if self.allow_different or m.conditions(without) == shared]
        if not comparable:
            reason = f"measured otherwise: {difference_text(successes[-1], shared, without)}"
            self._refused.append(f"{successes[-1].measure} {reason}")
            return None, Value(None, MISSING, reason)
        return comparable[-1], Value(None)

    def conditions(self, measure: str) -> Conditions | None:
        """Return the conditions under which most runs have the measure, at any moment."""
        if measure not in self._conditions:
            self._conditions[measure] = _majority_conditions(measure, self.entries)
        return self._conditions[measure]

    def fresh_copy(self, allow_different: bool = False) -> Selection:
        """Return a copy of the selection without its record of requested results."""
        return Selection(self.entries, self.tag, allow_different, self.or_newest)

    def sharing_among_requested(self) -> Selection:
        """Return a selection whose shared conditions are those of the runs that this one was asked for, measure by measure.

        Runs of another comparison, with more images or another solver, then do not decide what counts in this one. Results whose
        conditions are not recorded do not count.
        """
        shared = {
            measure: _majority_conditions(measure, list(requested.values()), recorded_only=True)
            for measure, requested in self._asked.items()
        }
        return Selection(self.entries, self.tag, or_newest=self.or_newest, recorded_only=True, _conditions=shared)

    def refusals(self) -> list[str]:
        """Return in words which results were asked for and left out because their conditions differ, and how many."""
        return [f"{reason} ({n} left out)" for reason, n in Counter(self._refused).items()]

    def tags(self, entry: Entry, measure: str) -> list[str]:
        """Return the moments at which a run has the measure."""
        return [tag for tag in entry.tags() if self.measured(entry, measure, tag)[0] is not None]


def _missing(entry: Entry, reason: str) -> Value:
    """Return that a run has no number: it failed, or the given reason."""
    if entry.status == FAILED:
        return Value(None, FAILED, "the run failed")
    return Value(None, MISSING, reason)


def _created(entry: Entry) -> str:
    return str(entry.facts.get("created", ""))


def scalar_of_result(measured: Measured, name: str) -> Value:
    """Return a result's scalar, or why there is none: it is unknown, not finite, or its definition gives none."""
    number = measured.scalars.get(name)
    if number is not None and math.isfinite(number):
        return Value(number)
    if reason := undefined_reason(measured.measure, measured.scalars, name, measured.card):
        return Value(None, "", reason)
    if name in measured.scalars:
        return Value(None, FAILED, "not finite")
    return Value(None, MISSING, f"{measured.analysis} has no {name}")


def undefined_reason(
    measure: str, scalars: Mapping[str, float | None], name: str, card: ObjectiveCard | None = None
) -> str:
    """Return in words why a good result has no such number by its definition, or an empty text.

    The mean of the positive eigenvalues where none is positive; a rise of the loss at a measured radius that is saturated.
    """
    if measure == "hessian_max_eigenvalue_spectrum" and name == "average_positive_eigenvalue":
        shares = [scalars.get(key) for key in ("negative_eigenvalue_proportion", "near_zero_proportion")]
        return "none positive" if sum(share or 0.0 for share in shares) > 1 - 1e-9 else ""
    if measure == "hessian_max_eigenvalue_spectrum" and name == "top1_average_positive_eigenvalue":
        return "none positive" if name not in scalars and "top1_negative_eigenvalue_proportion" in scalars else ""
    quantity, _, radius = name.rpartition("_r")
    if measure == "sharpness" and quantity in ("rise", "worst_rise") and f"rise_r{radius}" not in scalars:
        radii = card.solver.get("radii", ()) if card is not None else ()
        return "saturated" if radius in {f"{r:g}" for r in radii} else ""
    return ""


def _majority_conditions(measure: str, entries: Sequence[Entry], *, recorded_only: bool = False) -> Conditions | None:
    return majority({
        entry.id: [m for m in entry.results if m.measure == measure and (_is_recorded(m) or not recorded_only)]
        for entry in entries
    })  # fmt: skip


def _is_recorded(measured: Measured) -> bool:
    """Tell whether a result states all conditions of its measurement."""
    return measured.card is not None and measured.card.options is not None


def difference_text(measured: Measured, shared: Conditions | None, without: Sequence[str] = NAMED_BY_ROWS) -> str:
    """Return in words how a result's conditions differ from the shared ones."""
    result_conditions, shared_conditions = dict(measured.conditions(without)), dict(shared or ())
    keys = differing([tuple(result_conditions.items()), tuple(shared_conditions.items())])
    return "; ".join(
        f"{k} {shown_value(result_conditions, k)!r}, most runs {shown_value(shared_conditions, k)!r}" for k in keys
    )


def seeds_of(groups: Iterable[Mapping[int, Entry]]) -> list[int]:
    """Return the seeds that every group has."""
    sets = [set(group) for group in groups]
    return sorted(set.intersection(*sets)) if sets else []
