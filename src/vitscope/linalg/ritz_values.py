"""Which Ritz values are wanted, and how far each may be from an eigenvalue."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

Which = Literal["LM", "LA", "SA", "both"]
WHICH: tuple[str, ...] = get_args(Which)


class Ritz(NamedTuple):
    """Eigenpairs of a projection.

    Attributes:
        values: (m,) ascending.
        residuals: (m,) norms of H v - value v.
        vectors: (m, m), column i belongs to value i.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray


def select_ritz_values(values: np.ndarray, k: int, which: str, n_ends: int = 0) -> np.ndarray:
    """Return the numbers of the wanted Ritz values: ``LM`` by magnitude, ``LA`` descending, ``SA`` ascending.

    ``both`` gives the k largest, descending, then the k smallest, ascending; so do ``n_ends`` more of either end, after
    the others.
    """
    ascending = np.argsort(values, kind="stable")
    ends = np.concatenate([ascending[::-1][:n_ends], ascending[:n_ends]])
    if which == "both":
        return np.concatenate([select_ritz_values(values, 0, "LM", k), ends])
    order = {"LM": np.argsort(-np.abs(values), kind="stable"), "LA": ascending[::-1], "SA": ascending}[which]
    return np.concatenate([order[:k], ends])


def count(k: int, which: str, n_ends: int = 0) -> int:
    """Return how many values `select_ritz_values` gives."""
    return (2 * k if which == "both" else k) + 2 * n_ends


def errors(ritz: Ritz) -> np.ndarray:
    """Return an estimate of every Ritz value's error ``(m,)``: min(r, R^2 / gap).

    Ritz values closer than their residuals cannot be told apart and share one bound: R^2 sums their squared residuals, and
    the gap is the distance from the group to the nearest Ritz value outside it.
    """
    values, r, _ = ritz
    if len(values) < 2:
        return r.copy()
    spacing = np.diff(values)  # ascending, so >= 0
    together = spacing < np.maximum(np.minimum(r[:-1], r[1:]), 0.0)
    group = np.concatenate([[0], np.cumsum(~together)])  # (m,) group number of each value
    first = np.searchsorted(group, group, side="left")
    last = np.searchsorted(group, group, side="right") - 1
    below = np.where(first > 0, values[first] - values[np.maximum(first - 1, 0)], np.inf)
    above = np.where(last < len(values) - 1, values[np.minimum(last + 1, len(values) - 1)] - values[last], np.inf)
    gap = np.minimum(below, above)
    square = np.bincount(group, weights=r**2)[group]
    with np.errstate(divide="ignore", invalid="ignore"):
        quadratic = np.where(square == 0, 0.0, square / gap)
    return np.minimum(r, np.nan_to_num(quadratic, nan=0.0, posinf=np.inf))


def settled(ritz: Ritz, k: int, which: str, tol: float, n_ends: int = 0) -> tuple[np.ndarray, bool]:
    """Return the wanted Ritz values' numbers, and whether each is known to ``tol``.

    A value's tolerance is relative to its own magnitude, at least to 1e-3 of the largest. Error bounds say that there is an
    eigenvalue near, not that none has been passed over: so the next Ritz values in line may not reach among the wanted ones
    within their residuals either (on small networks this left two thirds of the misses, for 2 % more products).
    """
    selected = select_ritz_values(ritz.values, k, which, n_ends)
    if len(selected) < count(k, which, n_ends):
        return selected, False
    estimate = errors(ritz)
    is_within_tolerance = bool(np.all(estimate[selected] <= tolerances(ritz.values, selected, tol)))
    parts = [("LA", k), ("SA", k)] if which == "both" else [(which, k)]
    return selected, is_within_tolerance and not any(
        _rivalled(ritz, n, end, tol) for end, n in [*parts, ("LA", n_ends), ("SA", n_ends)]
    )


def _rivalled(ritz: Ritz, n: int, which: str, tol: float) -> bool:
    """Return whether the next Ritz value in line, at either end, might belong among the ``n`` wanted ones."""
    if n == 0 or n >= len(ritz.values):
        return False
    order = select_ritz_values(ritz.values, len(ritz.values), which)
    inside, rest = order[:n], order[n:]
    key = {"LM": np.abs(ritz.values), "LA": ritz.values, "SA": -ritz.values}[which]
    ends = {"LM": [rest.min(), rest.max()], "LA": [rest.max()], "SA": [rest.min()]}[which]  # values ascend
    reach = (key[ends] + ritz.residuals[ends]).max()
    return bool(reach > key[inside].min() + tolerances(ritz.values, inside[-1:], tol)[0])


def tolerances(values: np.ndarray, selected: np.ndarray, tol: float) -> np.ndarray:
    """Return the absolute error allowed for each chosen value."""
    magnitude = np.abs(values)
    return tol * np.maximum(magnitude[selected], 1e-3 * magnitude.max())
