"""Top eigenvalues batch by batch: which batches, how many at once, within which budget, from which rows on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitscope.core.probe import Batch
from vitscope.diagnostics.hessian import _budget
from vitscope.linalg.batched_lanczos import CannotBatch, at_once, eigenvalues_side_by_side, obstacle
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.krylov_basis import Memory
from vitscope.linalg.solvers import Solution, solve
from vitscope.runtime import distributed
from vitscope.runtime.progress import track

Row = Mapping[str, float | np.ndarray]
Group = list[tuple[int, Batch]]


@dataclass
class Work:
    """The eigenvalues of every batch's operator, one row a batch.

    Attributes:
        made: makes the operators.
        n_top, n_ends: eigenvalues by magnitude, and of either end.
        solving: options of `solve`.
        batches_at_once: None for what fits.
        budget_s: seconds; None for no limit.

    Raises:
        ValueError: fewer than one batch at once, several where that cannot be, or a budget that is not positive.
    """

    made: Curvatures
    n_top: int
    n_ends: int
    solving: dict[str, Any]
    batches_at_once: int | None
    budget_s: float | None

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.batches_at_once is not None and self.batches_at_once < 1:
            raise ValueError(f"Expected batches_at_once to be at least 1 or None, received {self.batches_at_once}.")
        reason = obstacle(self.made)
        if self.solving["solver"] != "lanczos":
            reason = f"Expected solver='lanczos' with several batches at once, received {self.solving['solver']!r}."
        if (self.batches_at_once or 1) > 1 and reason:
            raise ValueError(reason)
        self._memory = Memory()
        self._automatic = self.batches_at_once is None and not reason

    def rows(self, partial: MutableMapping[str, Row]) -> tuple[dict[int, Row], dict[str, Any]]:
        """Return the rows of all ranks by batch number, and what the card says of the way they were made.

        Args:
            partial: rows already known, by ``batch-<number>``; new ones are added as soon as they are known.
        """
        n, world = self.made.probe.n_batches, distributed.world_size()
        together = self._together()
        budget = _budget.unlimited(n)
        if self.budget_s is not None:
            n_values = self.n_top + 2 * self.n_ends
            budget = _budget.fitted(self.made, self.budget_s, n_values, self.solving["max_products"], together)
        own: dict[int, Row] = {}
        share = ((i, batch) for i, batch in self.made.probe.local_batches() if i < budget.limit)
        total = -(-len(range(distributed.rank(), budget.limit, world)) // together)
        for group in track(_grouped(share, together), "hessian spectrum", total=total):
            missing = [pair for pair in group if _key(pair[0]) not in partial]
            if own and not budget.allows(len(missing)):
                break
            for (index, _), row in zip(missing, self._computed(missing)):
                partial[_key(index)] = row
            budget.done(len(missing))
            own |= {index: partial[_key(index)] for index, _ in group}
        rows = {index: row for share in distributed.gather_objects(own) for index, row in share.items()}
        facts = {"batches_at_once": together} if together > 1 else {}
        if self.budget_s is not None:
            facts |= {**budget.facts, "batches": f"{len(rows)} of {n}"}
        return rows, facts

    def _together(self) -> int:
        if not self._automatic:
            return self.batches_at_once or 1
        first = next(iter(self.made.probe.local_batches()), None)
        fits = 1 if first is None else at_once(self.made, first, self.n_top, self.n_ends, self.solving["max_products"])
        return max(distributed.gather_objects(fits))

    def _computed(self, group: Group) -> Iterator[Row]:
        """Yield the rows of ``group``, the batches at once where they are several."""
        if len(group) > 1:
            options = {key: value for key, value in self.solving.items() if key != "solver"}
            try:
                solutions = eigenvalues_side_by_side(self.made, group, k=self.n_top, n_ends=self.n_ends, **options)
                yield from map(self._row, solutions)
                return
            except CannotBatch as error:
                if not self._automatic:
                    raise
                warnings.warn(f"one batch after the other: {error}", UserWarning, stacklevel=6)
        for index, batch in group:
            operator = self.made.batch(index, batch)
            yield self._row(solve(operator, k=self.n_top, n_ends=self.n_ends, memory=self._memory, **self.solving))

    def _row(self, solution: Solution) -> Row:
        pairs, top, ends = solution.pairs, self.n_top, self.n_ends
        return {
            "eigenvalues": pairs.values[:top],
            "residuals": pairs.residuals[:top],
            "errors": pairs.errors[:top],
            "converged": pairs.converged.astype(float)[:top],
            "l2_contribution": solution.l2_contribution[:top],
            "largest": pairs.values[top : top + ends],
            "smallest": pairs.values[top + ends :],
            "smallest_residuals": pairs.residuals[top + ends :],
            "n_products": float(pairs.n_products),
        }


def _key(index: int) -> str:
    return f"batch-{index:04d}"


def _grouped(share: Iterable[tuple[int, Batch]], n: int) -> Iterator[Group]:
    """Yield groups of up to ``n`` neighbours of equal shape."""
    group: Group = []
    for index, (x, y) in share:
        if group and (len(group) == n or (x.shape, y.shape) != (group[0][1][0].shape, group[0][1][1].shape)):
            yield group
            group = []
        group.append((index, (x, y)))
    if group:
        yield group
