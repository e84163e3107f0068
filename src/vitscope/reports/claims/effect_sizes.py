"""The statistics that claims are judged by: one number a seed, computed from the runs that a claim needs.

Each function looks for its runs by what their configurations say, pairs them by seed within one setting (data, objective,
length of training) and says what it compared, or what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitscope.config import loading
from vitscope.config.experiment_identity import identity, setting
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_index import Entry
from vitscope.reports.value_lookup import Selection, seeds_of

Runs = Mapping[int, Entry]
Reader = Callable[[Entry], float | None]


@dataclass(frozen=True)
class Effect:
    """What the runs say.

    Attributes:
        values: the statistic of each seed; empty where it could not be measured.
        compared: between which experiments, in words.
        lacking: what would have to be run or measured for it, in words.
        blocked: why it supports nothing, whatever its interval says; empty otherwise.
        refused: which results were left out because they were measured under other conditions than the rest, in words.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    compared: str = ""
    lacking: str = ""
    blocked: str = ""
    refused: str = ""


@dataclass(frozen=True)
class ReportRuns:
    """Where statistics find their numbers.

    Attributes:
        selection: the runs.
        costs: parameters and operations of models.
    """

    selection: Selection
    costs: Costs

    def groups(self, keep: Callable[[Entry], bool]) -> list[Runs]:
        """Return the trained experiments that ``keep`` accepts, by seed; those on random labels are evidence for nothing."""
        return list(self.selection.groups(lambda e: e.trained and not _random_labels(e) and keep(e)).values())

    def scalar(self, measure: str, name: str, tag: str | None = None) -> Reader:
        """Return a reader of a measure's scalar."""
        return lambda entry: self.selection.scalar(entry, measure, name, tag).number

    def metric(self, name: str) -> Reader:
        """Return a reader of a metric."""
        return lambda entry: self.selection.metric(entry, name).number

    def said(self, runs: Runs) -> str:
        """Return an experiment's name and cost."""
        entry = first(runs)
        cost = self.costs.of(entry)
        if cost.parameters is None or cost.flops is None:
            return entry.label
        return f"{entry.label} ({cost.parameters / 1e6:.2f}M parameters, {cost.flops / 1e9:.3g} GFLOPs)"


def _random_labels(entry: Entry) -> bool:
    return bool((entry.config.get("data") or {}).get("random_labels"))


def first(runs: Runs) -> Entry:
    """Return the run of the lowest seed."""
    return runs[min(runs)]


def option(entry: Entry, key: str, default: Any = None) -> Any:
    """Return a key of the run's model."""
    value = (entry.config.get("model") or {}).get(key, default)
    return default if value is None else value


def is_family(*names: str) -> Callable[[Entry], bool]:
    """Return a test of the family that the model belongs to."""
    return lambda entry: entry.kin in names


def difference(a: Runs, b: Runs, read: Reader) -> dict[int, float]:
    """Return ``read(a) - read(b)`` of the seeds that both have."""
    values: dict[int, float] = {}
    for seed in seeds_of([a, b]):
        left, right = read(a[seed]), read(b[seed])
        if left is not None and right is not None:
            values[seed] = left - right
    return values


def balanced(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean over parts of each seed, over the parts that have the most seeds and over seeds that they share.

    A seed for which some parts are missing would mix up seeds with parts.
    """
    most = max((len(part) for part in parts), default=0)
    full = [part for part in parts if len(part) == most and most]
    shared = set.intersection(*map(set, full)) if full else set()
    return {seed: float(np.mean([part[seed] for part in full])) for seed in sorted(shared)}


def slope(runs: Sequence[tuple[float, Runs]], read: Reader) -> dict[int, float]:
    """Return each seed's least-squares slope of ``read`` over the given positions, for seeds that all of them have."""
    values: dict[int, float] = {}
    x = np.array([position for position, _ in runs])
    for seed in seeds_of([group for _, group in runs]):
        y = [read(group[seed]) for _, group in runs]
        if all(v is not None for v in y):
            centred = x - x.mean()
            values[seed] = float(centred @ np.array(y, dtype=float) / (centred @ centred))
    return values


def steps(runs: Sequence[tuple[float, Runs]], read: Reader, seeds: Sequence[int]) -> list[float]:
    """Return the change of the mean over ``seeds`` from each position to the next."""
    means = [float(np.mean([read(group[seed]) or 0.0 for seed in seeds])) for _, group in runs]
    return [b - a for a, b in itertools.pairwise(means)]


def trend(runs: Sequence[tuple[float, Runs]], read: Reader, sign: int, lacking: str, least: int = 3) -> Effect:
    """Return the slope over ordered experiments; blocked where the means over seeds are not monotone.

    Args:
        runs: ``(position, experiment)`` in their order.
        read: what is read of each run.
        sign: of the claimed slope.
        lacking: what to say where there are too few of them.
        least: positions below which there is no trend to speak of.
    """
    if len(runs) < least:
        return Effect(lacking=lacking)
    values = slope(runs, read)
    compared = " → ".join(first(group).label for _, group in runs)
    if not values:
        return Effect(compared=compared, lacking=lacking)
    changes = steps(runs, read, list(values))
    wrong = [c for c in changes if c * sign < 0]
    return Effect(values, compared, blocked="the means are not monotone" if 0 < len(wrong) < len(changes) else "")


def plainest(groups: Sequence[Runs]) -> Runs | None:
    """Return the experiment whose model options are nearest to their defaults, of equals the one with most seeds."""

    def unusual(runs: Runs) -> tuple[int, int, str]:
        entry = first(runs)
        defaults = _defaults(entry.family)
        node = entry.config.get("model") or {}
        changed = sum(1 for key, value in node.items() if key in defaults and defaults[key] != value)
        return changed, -len(runs), entry.label

    return min(groups, key=unusual, default=None)


def _defaults(family: str) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    path = loading.folder() / "model" / f"{family}.yaml"
    if not path.is_file():
        return {}
    node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(node, dict)
    return {str(k): v for k, v in node.items() if not (isinstance(v, str) and "${" in v)}


def by_setting(groups: Sequence[Runs], without: Sequence[str] = ()) -> dict[str, list[Runs]]:
    """Return the experiments by what models must share to be compared."""
    found: dict[str, list[Runs]] = {}
    for runs in groups:
        found.setdefault(setting(first(runs).config, without), []).append(runs)
    return found


def same_but(runs: Runs, *keys: str) -> str:
    """Return a digest of the experiment without the named dotted keys: equal for those that differ in nothing else."""
    return loading.digest({k: v for k, v in identity(first(runs).config).items() if k not in keys})


def log_of(read: Reader) -> Reader:
    """Return a reader of the natural logarithm, of nothing where the number is not positive."""

    def logarithm(entry: Entry) -> float | None:
        value = read(entry)
        return math.log(value) if value is not None and value > 0 else None

    return logarithm
