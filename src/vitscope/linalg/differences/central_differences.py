"""Products with the Hessian by central differences of the gradient, with an estimate of their error.

For a unit vector u and a step h the product is D(h) = (g(w + h u) - g(w - h u)) / 2h. It differs from H u by the truncation
M h^2 / 6, M = |D^3 g[u, u, u]|, and by rounding, e / h, where e is the rounding of a gradient and of moved weights. Their sum
is least where both are balanced, at h = (3 e / M)^(1/3), which for e = eps |g| and derivatives of one size is about
eps^(1/3) times the size of the weights (Nocedal & Wright, Numerical Optimization, 2nd ed., section 8.1). e and M are not known:
a search goes upward from eps^(2/3) (1 + |w|), where rounding dominates, until the estimate of the error rises.

The estimate compares two steps: E = |D(2h) - D(h)|. Where truncation dominates it is three times the error of D(h)
(Richardson); where rounding dominates, D(2h) has half of the error of D(h), independent of it, and E is 1.1 times it: the error
is at most about E, and twice E is a safe bound. Each product is checked so: it costs four gradients.

Kinks of a network (ReLU, max-pooling) add an error of another kind. The gradient jumps by J at each kink within h of the weights,
which adds J / 2h to D(h) and J / 4h to D(2h). Where steps are so small that hardly any kink is within them, as in float64, E
shows each one. Over float32's steps there are many, their differences average out while their sum remains, and D(h) is far from
H u: `vitscope.linalg.differences.kinks` refuses that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.krylov_basis import norm
from vitscope.runtime import distributed
from vitscope.runtime.errors import NumericalError

#: ratio of neighboring steps of a search
STEP_RATIO = 4.0
#: steps in a row without a smaller estimate after which a search ends
PATIENCE = 2
#: largest number of steps of a search; twelve lie between its beginning and the size of the weights in float64
MOST_STEPS = 20
#: products after which the estimate is held against the tolerance during a computation: a first vector can be nearly
#: orthogonal to the eigenvectors that the error is relative to
FIRST_CHECK = 10
#: share of the tolerance from which on a product's estimate starts another search for a step
SEARCH_SHARE = 0.5
#: keys of a row of a resumable measurement: the relative error of its products, and the smallest and the largest step
ROW_ERROR, ROW_STEPS = "difference_error", "difference_steps"


class Gradients(Protocol):
    """Gradients of the data term beside the current weights."""

    dtype: torch.dtype

    def differences(self, direction: Tensor, steps: Sequence[float]) -> list[Tensor]:
        """Return ``(g(w + h direction) - g(w - h direction)) / 2h (size,)`` for each step h, the weights as they were."""
        ...

    def weight_norm(self) -> float:
        """Return the length of the weights."""
        ...


@dataclass
class DifferenceRecord:
    """Steps and errors of products by differences.

    Attributes:
        error: Largest estimate of a product's error, for unit vectors.
        largest: The length of the largest product with a unit vector.
        steps: The smallest and the largest step used; empty before the first product.
        last_step: Step of the last product, with which the next one begins; None before the first.
        n_products: Products made.
    """

    error: float = 0.0
    largest: float = 0.0
    steps: list[float] = field(default_factory=list)
    n_products: int = 0
    last_step: float | None = None

    @property
    def relative_error(self) -> float:
        """The largest error relative to the largest product, 0 where all products are 0 and known exactly."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.largest if self.largest > 0 else float("inf")

    def add(self, error: float, length: float, step: float) -> None:
        """Count one product.

        Args:
            error: Estimate of its error, for a unit vector.
            length: The step's length, for a unit vector.
            step: Length of the step.
        """
        self.error, self.largest = max(self.error, error), max(self.largest, length)
        self.steps = [min([*self.steps, step]), max([*self.steps, step])]
        self.n_products += 1
        self.last_step = step

    def check(self, tol: float, dtype: torch.dtype) -> None:
        """Refuse products whose error is larger than a tolerance.

        Raises:
            NumericalError: The estimated error relative to the largest product exceeds ``tol``.
        """
        if not self.relative_error <= tol:
            wide = "" if dtype == torch.float64 else "set dtype=float64, "
            raise NumericalError(
                "product",
                "difference",
                f"products are off by {self.relative_error:.2g} of the largest one (two steps, {self.steps[0]:.2g} and twice "
                f"that, compared), more than tol={tol:g}",
                f"{wide}{'or ' if wide else 'set '}another difference_step, or product=reverse where the model can be "
                "differentiated twice",
            )


class CentralDifferences:
    """Products ``v -> H v`` with the data term's Hessian from two gradients, each compared with another step's.

    Args:
        gradients: Object that gives differences of gradients.
        tol: Error of products relative to the largest one that is allowed.
        step: Length of the step; None to search for it with the first vector, and again where the estimate gets near ``tol``.
        shared: Whether all ranks make the same products and have to decide alike.

    Attributes:
        record: Steps and errors of the products so far.
    """

    def __init__(self, gradients: Gradients, *, tol: float, step: float | None = None, shared: bool = False) -> None:
        self.gradients, self.tol, self.fixed_step, self.shared = gradients, tol, step, shared
        self.record = DifferenceRecord()

    def product(self, v: Tensor) -> Tensor:
        """Return ``H v (size,)``.

        Raises:
            NumericalError: The error relative to the largest product exceeds the tolerance, or no step gives finite gradients.
        """
        length = norm(v)
        if not length > 0:
            return torch.zeros_like(v)
        u = v / length
        trial = self._trial(u)
        if not math.isfinite(trial.error + trial.length):
            raise NumericalError(
                "hessian", None, f"gradients beside the weights (step {trial.step:.2g}) are not finite",
                "set a smaller difference_step, or use float64",
            )  # fmt: skip
        self.record.add(trial.error, trial.length, trial.step)
        if self.record.n_products >= FIRST_CHECK:
            self.check()
        return trial.product.mul_(length)

    def _trial(self, u: Tensor) -> _Trial:
        """Return the product with a unit vector at the step of the one before, or at another one where that is too inexact."""
        step = self.fixed_step or self.record.last_step
        if step is None:
            trial = self._search_step(u, self._least_step())
        else:
            trial = self._measure_at(u, step)
            is_exact = trial.error <= SEARCH_SHARE * self.tol * max(self.record.largest, trial.length)
            if self.fixed_step is None and not is_exact:
                trial = min(trial, self._search_step(u, step / STEP_RATIO**3), key=lambda one: one.error)
        return trial

    def check(self) -> None:
        """Refuse the products made so far where they are not exact enough.

        Raises:
            NumericalError: See `DifferenceRecord.check`.
        """
        self.record.check(self.tol, self.gradients.dtype)

    def facts(self) -> dict[str, Any]:
        """Return what a row of a resumable measurement has to state.

        Raises:
            NumericalError: See `DifferenceRecord.check`.
        """
        self.check()
        return {ROW_ERROR: self.record.relative_error, ROW_STEPS: np.array(self.record.steps)}

    def _least_step(self) -> float:
        """Return the step from which on a search goes upward: too small, so that rounding dominates there."""
        eps = float(torch.finfo(self.gradients.dtype).eps)
        return eps ** (2 / 3) * (1.0 + self.gradients.weight_norm())

    def _measure_at(self, u: Tensor, step: float) -> _Trial:
        """Return the product with a unit vector at a step, compared with that at twice the step."""
        single, double = self.gradients.differences(u, (step, 2 * step))
        return self._compare(step, single, double)

    def _compare(self, step: float, single: Tensor, larger: Tensor) -> _Trial:
        """Return the product at ``step`` with its distance from that at a larger step."""
        facts = torch.tensor([norm(larger - single), norm(single)], dtype=torch.float64)
        if self.shared and distributed.world_size() > 1:  # rounding may differ between ranks, their steps must not
            facts = distributed.broadcast(facts.to(single.device)).cpu()
        error, length = facts.tolist()
        return _Trial(step, single, error if math.isfinite(error) else math.inf, length)

    def _search_step(self, u: Tensor, least: float) -> _Trial:
        """Return the product at the first step, going up from ``least`` by `STEP_RATIO`, after which the estimate only rises.

        The first minimum, not the lowest: where kinks make gradients jump, steps that no kink lies within come first, and large
        steps average over the jumps, which the second derivative does not contain.
        """
        step, n_worse = least, 0
        (product,) = self.gradients.differences(u, (step,))
        best = _Trial(step, product, math.inf, 0.0)
        for _ in range(MOST_STEPS):
            (larger,) = self.gradients.differences(u, (step * STEP_RATIO,))
            trial = self._compare(step, product, larger)
            if trial.error < best.error:
                best, n_worse = trial, 0
            elif n_worse + 1 >= PATIENCE:
                break
            else:
                n_worse += 1
            product, step = larger, step * STEP_RATIO
        # a step four times as long overstates truncation: compare with twice the step, at the best one and halfway to the next
        trials = [self._measure_at(u, best.step * factor) for factor in (1.0, STEP_RATIO / 2)]
        return min(trials, key=lambda trial: trial.error)


@dataclass
class _Trial:
    """A product with a unit vector at one step.

    Attributes:
        step: Length of the step.
        product: (size,) the product.
        error: Estimate of its error; infinite where it is not finite.
        length: The vector's length.
    """

    step: float
    product: Tensor
    error: float
    length: float


def gradient_difference(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], gradient: Callable[[], Sequence[Tensor]], step: float
) -> list[Tensor]:
    """Return ``(g(w + h u) - g(w - h u)) / 2h``, one tensor a parameter; the weights are given back bit for bit.

    Args:
        parameters: The weights w.
        direction: The direction u, in their shapes.
        gradient: Function that returns g at the weights as they are when it is called.
        step: The step h.
    """
    originals = [p.detach().clone() for p in parameters]
    sides: list[Sequence[Tensor]] = []
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, original, u in zip(parameters, originals, direction):
                    p.copy_(torch.add(original, u, alpha=sign * step))
            sides.append(gradient())
    finally:
        with torch.no_grad():
            for p, original in zip(parameters, originals):
                p.copy_(original)
    return [(plus - minus).div_(2 * step) for plus, minus in zip(*sides)]
