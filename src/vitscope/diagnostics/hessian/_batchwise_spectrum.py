"""Top eigenvalues of the Hessian of every batch: one after the other or several at once, within a time budget, resumable."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vitscope.core.probe import Batch
from vitscope.diagnostics.hessian import _budget
from vitscope.linalg.batched_lanczos import CannotBatch, at_once, eigenvalues_side_by_side, obstacle
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.solvers import Solution, solve
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Partial, Row, merge_rows

Group = list[tuple[int, Batch]]


@dataclass
class BatchwiseSpectrum:
    """Eigenvalues of the operator of every batch, one row per batch.

    Attributes:
        operators: The factory of operators, with the options of the solver.
        n_top: Number of eigenvalues by magnitude.
        n_ends: Number of eigenvalues of either end of the spectrum.
        batches_at_once: Number of batches analyzed together; None for as many as fit.
        budget_s: Seconds; None for no limit.

    Raises:
        ValueError: Fewer than one batch at once, several where that cannot be, or a budget that is not positive.
    """

    operators: Curvatures
    n_top: int
    n_ends: int
    batches_at_once: int | None
    budget_s: float | None

    def __post_init__(self) -> None:
        if self.batches_at_once is not None and self.batches_at_once < 1:
            raise ValueError(f"Expected batches_at_once to be at least 1 or None, received {self.batches_at_once}.")
        reason = obstacle(self.operators)
        solver = self.operators.options.solver
        if solver != "lanczos":
            reason = f"Expected solver='lanczos' with several batches at once, received {solver!r}."
        if (self.batches_at_once or 1) > 1 and reason:
            raise ValueError(reason)
        self._memory = self.operators.basis_memory()
        self._automatic = self.batches_at_once is None and not reason

    def rows(self, partial: Partial) -> tuple[dict[int, Row], dict[str, Any]]:
        """Return the rows of all ranks by batch number, and facts about the course of the computation for the card.

        Args:
            partial: Finished rows by ``batch-<number>``; each new row is added as soon as it is computed.
        """
        n, world = self.operators.probe.n_batches, distributed.world_size()
        together = self._together()
        budget = _budget.unlimited(n)
        if self.budget_s is not None:
            n_values = self.n_top + 2 * self.n_ends
            budget = _budget.fitted(self.operators, self.budget_s, n_values, together)
        rank_rows: dict[int, Row] = {}
        share = ((i, batch) for i, batch in self.operators.probe.local_batches() if i < budget.limit)
        total = -(-len(range(distributed.rank(), budget.limit, world)) // together)
        with distributed.failing_together():
            for group in track(_grouped(share, together), "hessian spectrum", total=total):
                missing = [pair for pair in group if _key(pair[0]) not in partial]
                if rank_rows and not budget.allows(len(missing)):
                    break
                for (index, _), row in zip(missing, self._computed(missing)):
                    partial[_key(index)] = row
                budget.done(len(missing))
                rank_rows |= {index: self.operators.read_row(partial[_key(index)]) for index, _ in group}
        rows = merge_rows(rank_rows)
        facts = {"batches_at_once": together} if together > 1 else {}
        if self.budget_s is not None:
            facts |= {**budget.facts, "batches": f"{len(rows)} of {n}"}
        return rows, facts

    def _together(self) -> int:
        if not self._automatic:
            return self.batches_at_once or 1
        operators = self.operators
        max_products = operators.options.max_products
        with distributed.failing_together():
            first = next(iter(operators.probe.local_batches()), None)
            n_fitting = 1 if first is None else at_once(operators, first, self.n_top, self.n_ends, max_products)
        return max(distributed.gather_objects(n_fitting))

    def _computed(self, group: Group) -> Iterator[Row]:
        """Yield the rows of ``group``, whose batches are analyzed together where it has several."""
        options = self.operators.options
        if len(group) > 1:
            try:
                solutions = eigenvalues_side_by_side(
                    self.operators, group, k=self.n_top, n_ends=self.n_ends, **options.search()
                )
                yield from map(self._row, solutions)
                return
            except CannotBatch as error:
                if not self._automatic:
                    raise
                warnings.warn(f"mini-batches are measured one after the other: {error}", UserWarning, stacklevel=6)
        for index, batch in group:
            operator = self.operators.batch(index, batch)
            solution = solve(
                operator,
                k=self.n_top,
                n_ends=self.n_ends,
                solver=options.solver,
                memory=self._memory,
                **options.search(),
            )
            facts = {} if operator.differences is None else operator.differences.facts()
            yield {**self._row(solution), **facts}

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
    """Yield groups of up to ``n`` neighbors of equal shape."""
    group: Group = []
    for index, (x, y) in share:
        if group and (len(group) == n or (x.shape, y.shape) != (group[0][1][0].shape, group[0][1][1].shape)):
            yield group
            group = []
        group.append((index, (x, y)))
    if group:
        yield group
