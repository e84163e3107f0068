"""Judge a point by its gradient, the ends of its spectrum and a slice of the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

#: units of the precision, relative, by which a loss may differ for rounding alone
ROUNDING = 64.0
TINY = 1e-300


class Limits(NamedTuple):
    """Thresholds of the verdict.

    Attributes:
        stationary: The share of the objective that counts.
        flat: A Hessian without an eigenvalue beyond that, by magnitude, is zero.
        unknown: An error of the smallest eigenvalue of at most that does not matter.
    """

    stationary: float
    flat: float
    unknown: float


def _curvature(row: Row) -> float:
    """Return the largest eigenvalue by magnitude."""
    return max(abs(row["largest_eigenvalue"]), abs(row["smallest_eigenvalue"]))


def predicted_decrease(row: Row, loss: float, weights: float) -> float:
    """Return the share of the objective that a gradient step is predicted to gain, see `critical_point`."""
    gradient, curvature = float(row["gradient_norm"]), _curvature(row)
    gain = gradient * max(weights, 1.0)
    if curvature > row["resolution"]:
        gain = min(gain, gradient**2 / (2 * curvature))
    return gain / max(loss, TINY) if gain else 0.0


def slice_drop(loss: float, values: Sequence[float], eps: float) -> float:
    """Return how far the least of ``values`` lies below ``loss``, as a share of it; 0 within rounding."""
    drop = (loss - min(values)) / max(abs(loss), TINY)
    return float(drop) if drop > ROUNDING * eps else 0.0


def judge(
    rows: Sequence[Row], decrease: float, drop: float, limits: Limits, norms: Mapping[str, float], l2: str
) -> tuple[str, tuple[str, ...]]:
    """Return the verdict that `critical_point` defines, and the reasons, one sentence each.

    Args:
        rows: Rows of growing parts of the data, the last one of all.
        decrease: The share of the objective that a gradient step is predicted to gain.
        drop: The share by which the slice falls.
        limits: Thresholds of the verdict.
        norms: Norms of the gradients under the three forms of the L2 term.
        l2: The form in force.
    """
    first, last = rows[0], rows[-1]
    low, residual, many = last["smallest_eigenvalue"], last["smallest_residual"], last["n_images"]
    reasons = (
        f"gradient norm {last['gradient_norm']:.3g} on {many} images: a gradient step is predicted to gain "
        f"{100 * decrease:.3g} % of the objective (stationary: below {100 * limits.stationary:.3g} %)",
        f"smallest eigenvalue {low:.3g} (residual {residual:.1g}) on {many} images, "
        f"{first['smallest_eigenvalue']:.3g} on {first['n_images']}; largest {last['largest_eigenvalue']:.3g}",
        f"the slice along its eigenvector falls by {100 * drop:.3g} % of the objective",
        f"gradient norms: loss alone {norms['nll']:.3g}, with half_sq {norms['half_sq']:.3g}, "
        f"with adamw {norms['adamw']:.3g}; the objective judged has l2={l2}",
    )
    if not last["converged"]:
        return "inconclusive", ("the eigenvalues did not converge: raise max_products", *reasons)
    if decrease > limits.stationary:
        return "not stationary", reasons
    if _curvature(last) <= limits.flat:
        return "inconclusive", ("the Hessian is zero within rounding: there is no verdict", *reasons)
    if low < -residual:
        if drop > 0:
            return "saddle", reasons
        return "inconclusive", ("the slice along the negative eigenvalue's eigenvector does not fall", *reasons)
    if low > residual:
        return "minimum", reasons
    if low < -last["resolution"] or last["smallest_error"] > limits.unknown:
        reason = (
            "the sign of the smallest eigenvalue is not known (it is within its residual of zero): raise max_products"
        )
        return "inconclusive", (reason, *reasons)
    if drop > limits.stationary:
        return "inconclusive", ("the slice along a direction without curvature falls", *reasons)
    return "minimum", reasons
