"""Effects of objective, images and training on which of two models looks flatter (docs/definitions.md section 11).

Eight conditions, {NLL, NLL + L2} x {clean, augmented images} x {trained weak, strong}, and so for either L2 form. In each
the difference ViT minus ConvNet of a rise or a curvature says who looks flatter; a factor's effect is the mean change of that
difference when the factor alone is switched. The effects of a full 2x2x2 are orthogonal: their shares of the variation of the
difference over the eight conditions, with that of the interactions, add up to one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitscope.diagnostics.hessian._nep_statistics import positive_interval
from vitscope.reports.claims import factorial_runs
from vitscope.reports.claims.effect_sizes import lowest_seed_run
from vitscope.reports.claims.factorial_runs import IMAGES, MODELS, TRAININGS, Results
from vitscope.reports.tables.table import Problem
from vitscope.reports.value_lookup import FAILED, Selection, seeds_of
from vitscope.stats.intervals import LEAST_IMAGES
from vitscope.stats.t_tests import Interval, t_interval

OBJECTIVES = {"nll": "NLL", "half_sq": "NLL + ½ wd Σ‖w‖²", "sum_norm": "NLL + wd Σ‖w‖"}
L2_FORMS = ("half_sq", "sum_norm")
FACTORS = ("training", "images", "objective")

#: radius at which the rise is compared; at 0.5 and 1 it is saturated
RADIUS = 0.1

#: training, images, objective
Condition = tuple[str, str, str]
CONDITIONS: tuple[Condition, ...] = tuple(itertools.product(TRAININGS, IMAGES, OBJECTIVES))


@dataclass(frozen=True)
class Quantity:
    """A number that is lower where the loss surface is flatter.

    Attributes:
        key: Name in files.
        title: Heading with the unit.
        analysis: The analysis whose result holds it, on augmented images.
        objectives: Objectives for which it is defined.
        units: Function that returns the number of independent parts of a result.
        sampled: Name of those parts; empty where there is one.
        value: Function that returns the number of a result under an objective, over the given parts.
        skewed: Whether the parts differ by factors, as mini-batches do: a sum over conditions then needs
            `vitscope.stats.intervals.LEAST_IMAGES` parts for an interval, and a single positive number has that of its logarithm.
        undefined: Function that returns a word that says why a result has no such number by definition; empty where it has one.
    """

    key: str
    title: str
    analysis: str
    objectives: tuple[str, ...]
    units: Callable[[Any], int]
    sampled: str
    value: Callable[[Any, str, np.ndarray], float]
    undefined: Callable[[Any], str]
    skewed: bool = False


@dataclass(frozen=True)
class Effect:
    """Effect of switching one factor.

    Attributes:
        quantity: Key of the quantity.
        l2: L2 form that the third factor adds.
        factor: One of `FACTORS`.
        convnet: Mean change of the ConvNet's number, with its interval.
        vit: Mean change of the ViT's number.
        difference: Mean change of ViT minus ConvNet.
        share: Share of the variation of the difference over the eight conditions.
        flips: Number of the four pairs of conditions in which the switch changes which model looks flatter.
    """

    quantity: str
    l2: str
    factor: str
    convnet: Interval
    vit: Interval
    difference: Interval
    share: float
    flips: int


@dataclass(frozen=True)
class FactorialResult:
    """The numbers of all conditions, and what each factor does to them.

    Attributes:
        labels: Names of the two experiments, by family.
        seeds: That all four trainings have.
        values: An interval by quantity, condition and column: ``convnet``, ``vit``, ``difference``.
        effects: Effects by quantity, L2 form and factor.
        problems: Missing or failed results.
        undefined: Words by quantity and condition where the definition gives no number: ``saturated``, ``none positive``.
    """

    labels: Mapping[str, str]
    seeds: tuple[int, ...]
    values: Mapping[tuple[str, Condition, str], Interval]
    effects: tuple[Effect, ...]
    problems: tuple[Problem, ...]
    undefined: Mapping[tuple[str, Condition], str]

    def lower(self, quantity: str, l2: str) -> int:
        """Return in how many of the eight conditions of that L2 form the ViT looks flatter."""
        return sum(self.values[quantity, c, "difference"].mean < 0 for c in conditions(l2))


def conditions(l2: str) -> list[Condition]:
    """Return the eight conditions with and without that L2 form."""
    return [c for c in CONDITIONS if c[2] in ("nll", l2)]


def analyze_factors(selection: Selection) -> FactorialResult | None:
    """Return what the runs say; None where no ConvNet and ViT were trained both weak and strong in one setting."""
    experiments = factorial_runs.find_experiments(selection)
    if experiments is None:
        return None
    seeds = seeds_of(experiments.values())
    results, problems = factorial_runs.load_results(experiments, [q.analysis for q in QUANTITIES], seeds, selection.tag)
    values: dict[tuple[str, Condition, str], Interval] = {}
    effects: list[Effect] = []
    undefined: dict[tuple[str, Condition], str] = {}
    for quantity in QUANTITIES:
        read = _Reader(quantity, results, seeds)
        if not read.complete:
            continue
        for condition in CONDITIONS:
            word = read.undefined(condition)
            if word:
                undefined[quantity.key, condition] = word
            if condition[2] in quantity.objectives:
                for column in (*MODELS, "difference"):
                    values[quantity.key, condition, column] = read.interval({condition: 1.0}, column)
        l2_forms = [l2 for l2 in L2_FORMS if l2 in quantity.objectives]
        effects += [_effect(read, values, l2, factor) for l2 in l2_forms for factor in FACTORS]
    for (key, condition, column), value in values.items():
        is_missing = column == "difference" and not math.isfinite(value.mean)
        if is_missing and (key, condition) not in undefined:
            problems.append(Problem(FAILED, ", ".join(condition), key, "not finite"))
    labels = {family: lowest_seed_run(experiments[family, "weak"]).label.split(",")[0] for family in MODELS}
    return FactorialResult(labels, tuple(seeds), values, tuple(effects), tuple(problems), undefined)


class _Reader:
    """One quantity of every condition, and intervals of weighted sums of it.

    Over several seeds a sum has the t-interval of its values by seed. With one seed it has the jackknife's over the parts that
    all results share (pairs of directions, mini-batches): for means that is the t-interval over parts, and since parts are
    left out of all results at once, random directions and images that conditions have in common cancel. Where parts are
    skewed, a number of a single condition has the interval of `positive_interval`; that
    of a sum over conditions does not cover with few parts (84 to 92 % of 4 to 16 mini-batches), and is not given.
    """

    def __init__(self, quantity: Quantity, results: Results, seeds: Sequence[int]) -> None:
        self.quantity, self._results, self._seeds = quantity, results, seeds
        names = [quantity.analysis + end for end in IMAGES.values()]
        required_keys = list(itertools.product(MODELS, TRAININGS, names, seeds))
        self.complete = all(key in results for key in required_keys)
        counts = {quantity.units(results[key]) for key in required_keys} if self.complete else set()
        self._units = counts.pop() if len(counts) == 1 else 0

    def interval(self, weights: Mapping[Condition, float], column: str) -> Interval:
        """Return the weighted sum over conditions of a model's number, or of the difference between the models'."""
        by_seed = [self._sum(weights, column, seed, None) for seed in self._seeds]
        if len(by_seed) > 1:
            if not np.isfinite(by_seed).all():
                return Interval(math.nan, math.nan, math.nan, len(by_seed))
            return t_interval(by_seed, max(self._magnitude(weights, column, seed) for seed in self._seeds))
        (whole,), n = by_seed, self._units
        if n < 2 or not math.isfinite(whole):
            return Interval(whole, math.nan, math.nan, 1)
        without = [self._sum(weights, column, self._seeds[0], part) for part in range(n)]
        if not np.isfinite(without).all():
            return Interval(whole, math.nan, math.nan, 1)
        if self.quantity.skewed and len(weights) == 1 and column in MODELS:
            ends = positive_interval(whole, np.array(without))
            return Interval(whole, math.nan, math.nan, 1, tuple(ends.tolist()) if np.isfinite(ends).all() else None)
        if self.quantity.skewed and n < LEAST_IMAGES:
            return Interval(whole, math.nan, math.nan, 1)
        pseudo_values = [n * whole - (n - 1) * value for value in without]
        spread = t_interval(pseudo_values, n * self._magnitude(weights, column, self._seeds[0]))
        return Interval(whole, spread.half_width, spread.p, 1)

    def undefined(self, c: Condition) -> str:
        """Return the word for a condition in which a result has no such number by its definition."""
        name = self.quantity.analysis + IMAGES[c[1]]
        words = (self.quantity.undefined(self._results[m, c[0], name, seed]) for m in MODELS for seed in self._seeds)
        return next(filter(None, words), "")

    def _sum(self, weights: Mapping[Condition, float], column: str, seed: int, left_out: int | None) -> float:
        return sum(self._terms(weights, column, seed, left_out))

    def _magnitude(self, weights: Mapping[Condition, float], column: str, seed: int) -> float:
        """Return the sum of what a weighted sum adds up, without its signs: its rounding is a share of that."""
        return sum(map(abs, self._terms(weights, column, seed, None)))

    def _terms(self, weights: Mapping[Condition, float], column: str, seed: int, left_out: int | None) -> list[float]:
        signs = {"vit": 1.0, "convnet": -1.0} if column == "difference" else {column: 1.0}
        return [
            w * sign * self._one(family, c, seed, left_out)
            for c, w in weights.items()
            for family, sign in signs.items()
        ]

    def _one(self, family: str, c: Condition, seed: int, left_out: int | None) -> float:
        result = self._results[family, c[0], self.quantity.analysis + IMAGES[c[1]], seed]
        parts = np.arange(self.quantity.units(result))
        return self.quantity.value(result, c[2], parts if left_out is None else np.delete(parts, left_out))


def _effect(read: _Reader, values: Mapping[tuple[str, Condition, str], Interval], l2: str, factor: str) -> Effect:
    condition_set, factor_index = conditions(l2), FACTORS.index(factor)
    switched_on = ("strong", "augmented", l2)[factor_index]
    weights = {c: 0.25 if c[factor_index] == switched_on else -0.25 for c in condition_set}
    columns = {column: read.interval(weights, column) for column in (*MODELS, "difference")}
    differences = {c: values[read.quantity.key, c, "difference"].mean for c in condition_set}
    total = float(np.square(np.array(list(differences.values())) - np.mean(list(differences.values()))).sum())
    share = 2 * columns["difference"].mean ** 2 / total if total > 0 else math.nan
    flips = sum(
        differences[c] * differences[_with_factor(c, factor_index, switched_on)] < 0
        for c in condition_set
        if c[factor_index] != switched_on
    )
    return Effect(read.quantity.key, l2, factor, **columns, share=share, flips=flips)


def _with_factor(condition: Condition, index: int, value: str) -> Condition:
    """Return a condition with one of its three factors set to another value."""
    training, images, objective = (value if i == index else factor for i, factor in enumerate(condition))
    return training, images, objective


def _rise(result: Any, objective: str, parts: np.ndarray) -> float:
    radius_index = np.flatnonzero(np.isclose(result.radii, RADIUS))
    if not len(radius_index) or result.saturated[radius_index[0]]:
        return math.nan  # the rise of a saturated loss does not measure flatness
    rise = result.rise_by_pair + (getattr(result, f"l2_{objective}_rise_by_pair") if objective != "nll" else 0.0)
    return float(rise[radius_index[0], parts].mean())


def _saturated(result: Any) -> str:
    radius_index = np.flatnonzero(np.isclose(result.radii, RADIUS))
    return "saturated" if len(radius_index) and result.saturated[radius_index[0]] else ""


def _none_positive(result: Any) -> str:
    return "" if (result.eigenvalues > result.residuals).any() else "none positive"


def _ape(result: Any, objective: str, parts: np.ndarray) -> float:
    # half_sq adds wd to every eigenvalue; the result's own L2 term, whatever its form, is taken off first
    shift = result.card.weight_decay if objective == "half_sq" else 0.0
    values = (result.eigenvalues - result.l2_contribution)[parts] + shift
    positive = values[values > result.residuals[parts]]
    return float(positive.mean()) if positive.size else math.nan


def _border(result: Any, objective: str, _: np.ndarray) -> float:
    return result.rise_at_border(getattr(result, f"l2_{objective}") if objective != "nll" else 0.0)


QUANTITIES = (
    Quantity("rise", f"rise at r = {RADIUS:g} (nats)", "sharpness", tuple(OBJECTIVES),
             lambda r: r.rise_by_pair.shape[1], "pairs of directions", _rise, _saturated),
    Quantity("ape", "APE (curvature)", "hessian", ("nll", "half_sq"), lambda r: len(r.eigenvalues), "mini-batches", _ape,
             _none_positive, skewed=True),
    Quantity("border", "surface's rise at its border (nats)", "landscape", tuple(OBJECTIVES), lambda r: 1, "", _border,
             lambda r: ""),
)  # fmt: skip
