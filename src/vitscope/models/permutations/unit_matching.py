"""Permutations of one network's units that match another's, by linear assignment (Ainsworth et al., ICLR 2023)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitscope.models.permutations.channel_labels import Label, leaves
from vitscope.models.permutations.unit_symmetry import Occurrence, Permutations, UnitGroup, UnitSymmetry, places_within
from vitscope.runtime import stop_flag

#: similarity of the units of both networks at an occurrence, (n, n): first those of the one that stays
Similarity = Callable[[Occurrence], Tensor]

#: a sweep that improves the sum of inner products by less than this share of it ends the search
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Matching:
    """Permutations, and how they were found.

    Attributes:
        permutations: By label: new unit i is old unit p[i].
        n_sweeps: Sweeps over all groups.
        converged: Whether the last sweep changed nothing.
    """

    permutations: Permutations
    n_sweeps: int
    converged: bool


def match_weights(
    symmetry: UnitSymmetry,
    fixed: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    seed: int = 0,
    max_sweeps: int = 100,
) -> Matching:
    """Return permutations of ``moving`` that make its inner product with ``fixed`` large, by coordinate ascent.

    Each step solves the linear assignment problem of one group exactly, with all others as they are; steps in a random order
    repeat until none improves. The search runs twice, from the identity and from a first sweep in the order of execution that
    looks at those weights only whose other axes are matched already, and the better end is returned. It is a local optimum:
    the problem over all groups is hard (Ainsworth et al., section 3).

    Args:
        symmetry: Groups of units.
        fixed: Parameters of the network that stays, by name.
        moving: Those of the network that is permuted.
        seed: Seed of the order of the steps.
        max_sweeps: Sweeps after which the search ends without convergence.
    """
    starts = [symmetry.identity(), _first_sweep(symmetry, fixed, moving)]
    ends = [_ascend(symmetry, fixed, moving, start, seed, max_sweeps) for start in starts]
    return max(ends, key=lambda end: inner_product(symmetry, fixed, moving, end.permutations))


def match_similarities(
    symmetry: UnitSymmetry, occurrences: Callable[[UnitGroup], Sequence[Occurrence]], similarity: Similarity
) -> Matching:
    """Return the permutations that make the sum of similarities of matched units largest, each group for itself.

    Args:
        symmetry: Groups of units.
        occurrences: Function that returns the places at which a group's units are compared; a group without any is not permuted.
        similarity: Function that returns the similarity of units at one of these places.
    """
    permutations = symmetry.identity()
    for group in symmetry.groups:
        stop_flag.check()
        if compared := occurrences(group):
            permutations |= _solved(group, similarity, compared)
    return Matching(permutations, 1, True)


def inner_product(
    symmetry: UnitSymmetry, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor], permutations: Permutations
) -> float:
    """Return the inner product of all parameters after the permutations, accumulated in float64."""
    total = 0.0
    for name, a in fixed.items():
        b = symmetry.permuted(name, moving[name], permutations)
        total += float(torch.dot(a.double().flatten(), b.double().flatten()))
    return total


def _first_sweep(symmetry: UnitSymmetry, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor]) -> Permutations:
    permutations = symmetry.identity()
    open_groups = {group.label: group for group in symmetry.groups}
    while open_groups:
        unmatched = {label for group in open_groups.values() for label in (group.label, *group.channels)}
        ready = {
            label: [o for o in group.occurrences if o.name in fixed and not _other_labels(symmetry, o) & unmatched]
            for label, group in open_groups.items()
        }
        # the group of which most is known; with equal shares, the first in the order of execution
        label = max(open_groups, key=lambda key: sum(o.size for o in ready[key]) > 0)
        group = open_groups.pop(label)
        permutations |= _solved(
            group, _weights_at(symmetry, fixed, moving, permutations), ready[label] or group.occurrences
        )
    return permutations


def _other_labels(symmetry: UnitSymmetry, occurrence: Occurrence) -> set[Label]:
    """Return the labels of the other axes of an occurrence's parameter."""
    labels = symmetry.axes[occurrence.name]
    return {
        leaf for k, label in enumerate(labels) if label is not None and k != occurrence.axis for leaf in leaves(label)
    }


def _ascend(
    symmetry: UnitSymmetry,
    fixed: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    start: Permutations,
    seed: int,
    max_sweeps: int,
) -> Matching:
    permutations, order = dict(start), np.random.default_rng(seed)
    value = inner_product(symmetry, fixed, moving, permutations)
    for sweep in range(1, max_sweeps + 1):
        before = value
        for index in order.permutation(len(symmetry.groups)):
            stop_flag.check()
            group = symmetry.groups[index]
            similarity = _cached(_weights_at(symmetry, fixed, moving, permutations))
            new = _solved(group, similarity, group.occurrences)
            gain = sum(_gain(o, similarity(o), permutations, new) for o in group.occurrences)
            if _meets_itself(symmetry, group):  # the assignment then takes one of two axes of a parameter at a time
                names = {o.name: fixed[o.name] for o in group.occurrences if o.name in fixed}
                both = [inner_product(symmetry, names, moving, p) for p in (permutations | new, permutations)]
                gain = both[0] - both[1]
            if gain > _TOLERANCE * abs(value):
                permutations |= new
                value += gain
        if value <= before:
            return Matching(permutations, sweep, True)
    return Matching(permutations, max_sweeps, False)


def _cached(similarity: Similarity) -> Similarity:
    return functools.cache(similarity)


def _gain(o: Occurrence, similarity: Tensor, old: Permutations, new: Permutations) -> float:
    """Return by how much the similarity of matched units grows at one place."""
    rows = torch.arange(o.size)
    values = similarity.cpu()
    sums = [float(values[rows, places_within(o, p)].sum()) for p in (old | new, old)]
    return sums[0] - sums[1]


def _meets_itself(symmetry: UnitSymmetry, group: UnitGroup) -> bool:
    group_labels = {group.label, *group.channels}
    return any(_other_labels(symmetry, o) & group_labels for o in group.occurrences)


def _weights_at(
    symmetry: UnitSymmetry, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor], permutations: Permutations
) -> Similarity:
    def similarity(o: Occurrence) -> Tensor:
        if o.name not in fixed:
            return torch.zeros(o.size, o.size, dtype=torch.float64)
        a = fixed[o.name].narrow(o.axis, o.start, o.size).movedim(o.axis, 0).reshape(o.size, -1)  # (n, rest)
        b = symmetry.permuted(o.name, moving[o.name], permutations, but=o.axis)
        b = b.narrow(o.axis, o.start, o.size).movedim(o.axis, 0).reshape(o.size, -1)
        return a.double() @ b.double().T  # (n, rest) @ (rest, n)

    return similarity


def _solved(group: UnitGroup, similarity: Similarity, occurrences: Sequence[Occurrence]) -> Permutations:
    """Return the best permutations of one group: of units, or of heads and of the channels of each."""
    n = group.label.size
    score = np.zeros((n, n))
    by_channels: dict[Label, np.ndarray] = {}
    for occurrence in occurrences:
        matrix = similarity(occurrence).cpu().numpy()
        if occurrence.heads is None:
            score += matrix
        else:
            label = occurrence.label.root
            by_channels[label] = by_channels.get(label, 0.0) + matrix
    matches: dict[Label, np.ndarray] = {}
    for label, matrix in by_channels.items():
        matches[label], head_score = _matched_channels(label, matrix, group.label)
        score += head_score
    order = np.arange(n) if group.label.fixed else linear_sum_assignment(score, maximize=True)[1]
    solved = {group.label: torch.from_numpy(order)}
    for label in group.channels:
        unmatched = np.tile(np.arange(label.size), (n, 1))
        solved[label] = torch.from_numpy(matches[label][np.arange(n), order] if label in matches else unmatched)
    return solved


def _matched_channels(label: Label, similarity: np.ndarray, heads: Label) -> tuple[np.ndarray, np.ndarray]:
    """Return the best permutation of the channels for each pair of heads (heads, heads, channels), and its score (heads, heads).

    Args:
        label: Label of the channels of each head.
        similarity: (heads * channels, heads * channels).
        heads: Label of the heads; those that stay in place need no matches with others.
    """
    n, size = heads.size, label.size
    pairs = similarity.reshape(n, size, n, size).transpose(0, 2, 1, 3)  # (heads, heads, channels, channels)
    matches, score = np.tile(np.arange(size), (n, n, 1)), np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            if label.fixed or (heads.fixed and a != b):
                score[a, b] = np.trace(pairs[a, b])
                continue
            matches[a, b] = linear_sum_assignment(pairs[a, b], maximize=True)[1]
            score[a, b] = pairs[a, b][np.arange(size), matches[a, b]].sum()
    return matches, score
