"""The statistics that claims are judged by: one number per seed, computed from the runs that a claim needs.

Each function looks for its runs by what their configurations say, pairs them by seed within one setting (data, objective,
length of training) and says what it compared, or what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitscope.config import loading
from vitscope.config.experiment_identity import identity, setting
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.value_lookup import Selection, seeds_of

Runs = Mapping[int, Entry]
Reader = Callable[[Entry], float | None]


@dataclass(frozen=True)
class Effect:
    """A statistic per seed, with the comparison it came from.

    Attributes:
        values: The statistic of each seed; empty where it could not be measured.
        compared: Names of the compared experiments.
        lacking: Trainings or analyses that are missing for it, in words.
        blocked: Reason why it supports no claim whatever its interval is; empty if there is none.
        decides_nothing: Whether that reason also keeps it from contradicting a claim.
        refused: Results that were left out because they were measured under other conditions than the rest, and experiments that
            lack seeds of the rest, in words.
        parts: Name and values by seed of each experiment, or pair of experiments, that the statistic is a mean over; empty
            where it is no mean over several.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    compared: str = ""
    lacking: str = ""
    blocked: str = ""
    refused: str = ""
    decides_nothing: bool = False
    parts: tuple[tuple[str, Mapping[int, float]], ...] = ()


@dataclass(frozen=True)
class ReportRuns:
    """The runs and model costs that statistics read.

    Attributes:
        selection: The runs.
        costs: Parameters and operations of models.
    """

    selection: Selection
    costs: Costs

    def groups(self, keep: Callable[[Entry], bool]) -> list[Runs]:
        """Return the experiments that ``keep`` accepts, by seed: trained from initial weights, and not on random labels.

        A training from another file's weights or whose length was changed on the way is no repetition of the experiment that
        its configuration states (`vitscope.config.experiment_identity.experiment`), and cannot be set against it.
        """
        groups = self.selection.groups(lambda e: e.from_initial_weights and not _random_labels(e) and keep(e))
        return list(groups.values())

    def scalar(self, measure: str, name: str, tag: str | None = None) -> Reader:
        """Return a reader of a measure's scalar."""
        return lambda entry: self.selection.scalar(entry, measure, name, tag).number

    def metric(self, name: str) -> Reader:
        """Return a reader of a metric."""
        return lambda entry: self.selection.metric(entry, name).number

    def describe(self, runs: Runs) -> str:
        """Return an experiment's name and cost."""
        entry = lowest_seed_run(runs)
        cost = self.costs.of(entry)
        if cost.parameters is None or cost.flops is None:
            return entry.label
        return f"{entry.label} ({cost.parameters / 1e6:.2f}M parameters, {cost.flops / 1e9:.3g} GFLOPs)"


def _random_labels(entry: Entry) -> bool:
    return bool((entry.config.get("data") or {}).get("random_labels"))


def lowest_seed_run(runs: Runs) -> Entry:
    """Return the run of the lowest seed."""
    return runs[min(runs)]


def option(entry: Entry, key: str, default: Any = None) -> Any:
    """Return a key of the run's model."""
    value = (entry.config.get("model") or {}).get(key, default)
    return default if value is None else value


def is_family(*names: str) -> Callable[[Entry], bool]:
    """Return a test of the family that the model belongs to."""
    return lambda entry: entry.kin in names


def paired_difference(a: Runs, b: Runs, read: Reader) -> dict[int, float]:
    """Return ``read(a) - read(b)`` of the seeds that both have."""
    values: dict[int, float] = {}
    for seed in seeds_of([a, b]):
        first_value, second_value = read(a[seed]), read(b[seed])
        if first_value is not None and second_value is not None:
            values[seed] = first_value - second_value
    return values


def balanced_parts(parts: Sequence[Mapping[int, float]]) -> tuple[list[int], list[int]]:
    """Return the indices of the parts over which a mean of each seed is taken, and these seeds.

    A seed for which some parts are missing would mix up seeds with parts. All parts that are taken have all seeds that are taken.
    Parts are added in the order of their number of seeds, those of one number together, as long as they share seeds; taken is
    what has the most values, parts times seeds, and of equal numbers the one of more parts.
    """
    best: tuple[list[int], set[int]] = ([], set())
    for least in sorted({len(part) for part in parts}, reverse=True):
        indices = [i for i, part in enumerate(parts) if len(part) >= least]
        shared = set.intersection(*(set(parts[i]) for i in indices))
        if shared and len(indices) * len(shared) >= len(best[0]) * len(best[1]):
            best = (indices, shared)
    return best[0], sorted(best[1])


def balanced_means(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean of each seed over the parts, for the parts and seeds of `balanced_parts`."""
    indices, seeds = balanced_parts(parts)
    return {seed: float(np.mean([parts[i][seed] for i in indices])) for seed in seeds}


def balanced_effect(parts: Sequence[Mapping[int, float]], names: Sequence[str], lacking: str) -> Effect:
    """Return the effect of `balanced_means`, which names the parts that it is taken over, and those that are left out.

    Args:
        parts: Values by seed of each part.
        names: Names of the parts; where several are taken, each is followed by its own mean.
        lacking: Text of the effect if no part has a value.
    """
    indices, seeds = balanced_parts(parts)
    left_out = [
        f"{name} left out: it has {len(set(seeds) & set(part))} of the {len(seeds)} seeds"
        for i, (name, part) in enumerate(zip(names, parts))
        if i not in indices
    ]
    if not seeds:
        return Effect(compared="; ".join(names), lacking=lacking)
    # pairs, since two experiments that differ in many options can have one name
    chosen_parts = tuple((names[i], {seed: parts[i][seed] for seed in seeds}) for i in indices)
    if len(chosen_parts) == 1:
        return Effect(balanced_means(parts), chosen_parts[0][0], refused="; ".join(left_out))
    compared = "; ".join(f"{name}: {np.mean(list(values.values())):z.3g}" for name, values in chosen_parts)
    return Effect(balanced_means(parts), compared, refused="; ".join(left_out), parts=chosen_parts)


def slopes(runs: Sequence[tuple[float, Runs]], read: Reader) -> dict[int, float]:
    """Return each seed's least-squares slope of ``read`` over the given positions, for seeds that all of them have."""
    values: dict[int, float] = {}
    x = np.array([position for position, _ in runs])
    for seed in seeds_of([group for _, group in runs]):
        y = [read(group[seed]) for _, group in runs]
        if all(v is not None for v in y):
            centered, heights = x - x.mean(), np.array(y, dtype=float)
            # from the first value: equal values have slope 0, and not the rounding of sums, which has one sign for all seeds
            values[seed] = float(centered @ (heights - heights[0]) / (centered @ centered))
    return values


def mean_changes(runs: Sequence[tuple[float, Runs]], read: Reader, seeds: Sequence[int]) -> list[float]:
    """Return the change of the mean over ``seeds`` from each position to the next."""
    means = [float(np.mean([read(group[seed]) or 0.0 for seed in seeds])) for _, group in runs]
    return [b - a for a, b in itertools.pairwise(means)]


def longest_trend(
    chains: Iterable[Sequence[tuple[float, Runs]]], read: Reader, sign: int, lacking: str, min_positions: int = 3
) -> Effect:
    """Return the `trend` of the chain of experiments with the most measured positions, of equals the one with the most seeds.

    Args:
        chains: Chains of ``(position, experiment)`` in any order; positions that no run was measured at are left out.
        read: Function that returns the number of a run, None if it has none.
        sign: Sign of the claimed slope.
        lacking: Text of the effect if no chain has enough experiments.
        min_positions: Positions below which there is no trend to speak of.
    """
    best, best_size = Effect(lacking=lacking), (0, 0)
    for chain in chains:
        if len(chain) < min_positions:  # not read: conditions of its results must not decide those of a longer chain
            continue
        measured = sorted(
            ((position, runs) for position, runs in chain if any(read(run) is not None for run in runs.values())),
            key=lambda part: part[0],
        )
        effect = trend(measured, read, sign, lacking, min_positions)
        size = (len(measured), len(effect.values))
        if effect.values and size > best_size:
            best, best_size = effect, size
    return best


def trend(runs: Sequence[tuple[float, Runs]], read: Reader, sign: int, lacking: str, min_positions: int = 3) -> Effect:
    """Return the slope over ordered experiments; blocked where the means over seeds are not monotone.

    Args:
        runs: ``(position, experiment)`` in their order.
        read: Function that returns the number of a run, None if it has none.
        sign: Sign of the claimed slope.
        lacking: Text of the effect if there are too few experiments.
        min_positions: Positions below which there is no trend to speak of.
    """
    if len(runs) < min_positions:
        return Effect(lacking=lacking)
    values = slopes(runs, read)
    compared = " → ".join(lowest_seed_run(group).label for _, group in runs)
    if not values:
        return Effect(compared=compared, lacking=lacking)
    changes = mean_changes(runs, read, list(values))
    opposite_changes = [c for c in changes if c * sign < 0]
    return Effect(
        values, compared, blocked="the means are not monotone" if 0 < len(opposite_changes) < len(changes) else ""
    )


def plainest(groups: Sequence[Runs]) -> Runs | None:
    """Return the experiment whose model options are nearest to their defaults, of equals the one with most seeds."""

    def departure_from_defaults(runs: Runs) -> tuple[int, int, str]:
        entry = lowest_seed_run(runs)
        defaults = _defaults(entry.family)
        node = entry.config.get("model") or {}
        changed = sum(1 for key, value in node.items() if key in defaults and defaults[key] != value)
        return changed, -len(runs), entry.label

    return min(groups, key=departure_from_defaults, default=None)


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
    settings: dict[str, list[Runs]] = {}
    for runs in groups:
        settings.setdefault(setting(lowest_seed_run(runs).config, without), []).append(runs)
    return settings


def digest_without(runs: Runs, *keys: str) -> str:
    """Return a digest of the experiment without the named dotted keys: equal for those that differ in nothing else."""
    return loading.digest({k: v for k, v in identity(lowest_seed_run(runs).config).items() if k not in keys})


def logarithm_of(read: Reader) -> Reader:
    """Return a reader of the natural logarithm; it gives None where the number is not positive."""

    def logarithm(entry: Entry) -> float | None:
        value = read(entry)
        return math.log(value) if value is not None and value > 0 else None

    return logarithm
