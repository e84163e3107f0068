"""Similarities of all images, without groups of them and with the second model's images permuted, divided among the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from vitscope.diagnostics.cka._comparisons import Comparison, Pair
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.stats.jackknife import group_numbers

#: permutations that are computed at once, so that progress is shown between them
_AT_ONCE = 10


def resampled(
    comparison: Comparison, pair: Pair, *, n_permutations: int, seed: int, intervals: bool, description: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the similarity ``(S, T)``, those without a group ``(G or 0, S, T)`` and those of permuted images ``(P, S, T)``.

    Args:
        comparison: The measure, which compares a pair of representations.
        pair: Representations of the same images.
        n_permutations: P, orders drawn for the second's images.
        seed: Seed of the draws.
        intervals: Whether groups are left out.
        description: The text beside the progress.
    """
    with single_thread():
        return _resampled(comparison, pair, n_permutations, seed, intervals, description)


def _resampled(
    comparison: Comparison, pair: Pair, n_permutations: int, seed: int, intervals: bool, description: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, rank, world = len(pair.first[0].features), distributed.rank(), distributed.world_size()
    draws = list(range(rank, n_permutations, world))
    values: dict[int, np.ndarray] = {}
    with distributed.failing_together():
        for start in track(range(0, len(draws) + 1, _AT_ONCE), description):
            part = draws[start : start + _AT_ONCE]
            orders = {draw: torch.from_numpy(np.random.default_rng([seed, draw]).permutation(n)) for draw in part}
            if start == 0:
                orders = {-1: torch.arange(n), **orders}  # the images as they are
            values |= dict(zip(orders, comparison.similarities(pair, list(orders.values()))))
        # one rank's numbers for all, as those of others may differ by rounding
        left_out = comparison.without_groups(pair, group_numbers(n)) if intervals and rank == 0 else None
    merged: dict[int, np.ndarray] = {}
    for share in reversed(distributed.gather_objects(values)):
        merged |= share
    left_out = distributed.gather_objects(left_out)[0]
    if left_out is None:
        left_out = np.zeros((0, *pair.shape))
    nulls = np.zeros((0, *pair.shape))
    if n_permutations:
        nulls = np.stack([merged[draw] for draw in range(n_permutations)])
    return merged[-1], left_out, nulls


@contextmanager
def single_thread() -> Iterator[None]:
    """Let decompositions run in one thread: matrices of some hundred rows take several times as long in more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
