"""Which number of a run stands for a measure: at one moment, under the conditions that the compared runs share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitscope.reports.evidence import IN_A_TABLE, Entry, Measured, majority

MISSING, FAILED = "missing", "failed"


@dataclass(frozen=True)
class Value:
    """A number of one run, or why there is none.

    Attributes:
        number: None where there is none.
        problem: ``missing`` or ``failed``; empty for a number, and where the measure's definition gives none.
        why: in words.
    """

    number: float | None
    problem: str = ""
    why: str = ""


@dataclass
class Selection:
    """The runs that count, and the results of theirs that may be compared.

    Args:
        entries: superseded ones are left out.
        tag: the moment that tables show.
        allow_different: take results whose objective cards differ.
        any_size: where a run has no result under the shared conditions, take one that differs in the number of images alone.
            Claims compare means over images or batches, and a run on a few images cannot be measured on many.
    """

    entries: Sequence[Entry]
    tag: str = "end"
    allow_different: bool = False
    any_size: bool = False
    _conditions: dict[str, tuple[Any, ...] | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.entries = [entry for entry in self.entries if not entry.superseded]

    def groups(self, keep: Callable[[Entry], bool] = lambda _: True) -> dict[str, dict[int, Entry]]:
        """Return the runs of each experiment by seed, in the order of the entries."""
        groups: dict[str, dict[int, Entry]] = {}
        for entry in self.entries:
            if keep(entry):
                groups.setdefault(entry.group, {})[entry.seed] = entry
        return groups

    def metric(self, entry: Entry, name: str) -> Value:
        """Return a metric's last value."""
        if name not in entry.metrics:
            failed = entry.status == FAILED
            return Value(None, FAILED if failed else MISSING, "the run failed" if failed else "not in the journal")
        number = entry.metrics[name]
        return Value(None, FAILED, "not finite") if number is None or not math.isfinite(number) else Value(number)

    def scalar(self, entry: Entry, measure: str, name: str, tag: str | None = None) -> Value:
        """Return a measure's scalar, at the tables' moment by default."""
        measured, why = self.measured(entry, measure, tag)
        if measured is None:
            return why
        return of_result(measured, name)

    def measured(self, entry: Entry, measure: str, tag: str | None = None) -> tuple[Measured | None, Value]:
        """Return the newest result of a measure under the shared conditions, or why there is none."""
        tag = self.tag if tag is None else tag
        found = [m for m in entry.results if m.measure == measure and m.tag == tag]
        good = [m for m in found if not m.error]
        if not good:
            if found:
                return None, Value(None, FAILED, found[-1].error)
            failed = entry.status == FAILED
            return None, Value(
                None, FAILED if failed else MISSING, "the run failed" if failed else f"not measured at {tag}"
            )
        shared = self.conditions(measure)
        same = [m for m in good if self.allow_different or m.conditions(IN_A_TABLE) == shared]
        if not same and self.any_size:
            same = [m for m in good if _but_size(m.conditions(IN_A_TABLE)) == _but_size(shared or ())]
        if not same:
            return None, Value(None, MISSING, f"measured otherwise: {difference(good[-1], shared or ())}")
        return same[-1], Value(None)

    def conditions(self, measure: str) -> tuple[Any, ...] | None:
        """Return the conditions under which most runs have the measure, at any moment."""
        if measure not in self._conditions:
            found = {entry.id: [m for m in entry.results if m.measure == measure] for entry in self.entries}
            self._conditions[measure] = majority(found, IN_A_TABLE)
        return self._conditions[measure]

    def tags(self, entry: Entry, measure: str) -> list[str]:
        """Return the moments at which a run has the measure."""
        return [tag for tag in entry.tags() if self.measured(entry, measure, tag)[0] is not None]


def of_result(measured: Measured, name: str) -> Value:
    """Return a result's scalar, or why there is none: it is unknown, not finite, or its definition gives none."""
    number = measured.scalars.get(name)
    if number is not None and math.isfinite(number):
        return Value(number)
    if why := undefined(measured.measure, measured.scalars, name):
        return Value(None, "", why)
    return (
        Value(None, FAILED, "not finite")
        if name in measured.scalars
        else Value(None, MISSING, f"{measured.analysis} has no {name}")
    )


def undefined(measure: str, scalars: Mapping[str, float | None], name: str) -> str:
    """Return in words why a good result has no such number by its definition, or an empty text.

    The mean of the positive eigenvalues where none is positive; a rise of the loss at a radius that is saturated.
    """
    if measure == "hessian_max_eigenvalue_spectrum" and name == "average_positive_eigenvalue":
        shares = [scalars.get(key) for key in ("negative_eigenvalue_proportion", "near_zero_proportion")]
        return "none positive" if sum(share or 0.0 for share in shares) > 1 - 1e-9 else ""
    if measure == "hessian_max_eigenvalue_spectrum" and name == "top1_average_positive_eigenvalue":
        return "none positive" if name not in scalars and "top1_negative_eigenvalue_proportion" in scalars else ""
    quantity, _, radius = name.rpartition("_r")
    if measure == "sharpness" and quantity in ("rise", "worst_rise"):
        return "saturated" if f"rise_r{radius}" not in scalars and scalars.get("nll_center") is not None else ""
    return ""


def _but_size(conditions: Sequence[Any]) -> list[Any]:
    keys = ("analysis", *IN_A_TABLE)
    return [value for key, value in zip(keys, conditions) if key != "n_images"]


def difference(measured: Measured, shared: Sequence[Any]) -> str:
    """Return in words how a result's conditions differ from the shared ones."""
    keys = ("analysis", *IN_A_TABLE)
    own = measured.conditions(IN_A_TABLE)
    return (
        "; ".join(f"{k} {a!r}, most runs {b!r}" for k, a, b in zip(keys, own, shared) if a != b) or "unknown conditions"
    )


def seeds_of(groups: Iterable[Mapping[int, Entry]]) -> list[int]:
    """Return the seeds that every group has."""
    sets = [set(group) for group in groups]
    return sorted(set.intersection(*sets)) if sets else []
