"""The largest eigenvalue as the optimizer feels it, against its limit of stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.curvatures import curvatures
from vitscope.linalg.scaled import scaled_eigenvalues
from vitscope.measure_options import record_options
from vitscope.probe import ObjectiveCard, Probe


@dataclass(frozen=True)
class PreconditionedSharpnessResult:
    """Eigenvalues of P^-1 H, with P = diag(sqrt(v) + eps) of AdamW, or the identity.

    Attributes:
        eigenvalues: (k,) the largest, descending.
        residuals: (k,) of the symmetric form P^-1/2 H P^-1/2.
        converged: (k,) booleans.
        threshold: 2 (1 + beta1) / ((1 - beta1) lr), 38 / lr for beta1 = 0.9: above it the linearised iteration diverges;
            NaN without ``lr``.
        ratio: largest eigenvalue / threshold; NaN without ``lr``.
        lr: the learning rate, NaN where not given.
        beta1: the momentum.
        preconditioner: ``adamw`` or ``identity``.
        n_products: products with the Hessian.
        card: under which conditions.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    threshold: float
    ratio: float
    lr: float
    beta1: float
    preconditioner: str
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        logged = {
            "eigenvalue_max": float(self.eigenvalues[0]),
            "threshold": self.threshold,
            "ratio": self.ratio,
            "n_products": float(self.n_products),
        }
        return {name: value for name, value in logged.items() if np.isfinite(value)}


@record_options
def preconditioned_sharpness(
    probe: Probe,
    *,
    lr: float | None = None,
    beta1: float = 0.9,
    preconditioner: str = "auto",
    k: int = 1,
    tol: float = 1e-3,
    parameters: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    bn: str = "eval",
    micro_batch: int | None = None,
    max_products: int = 200,
    max_memory: float | None = None,
    seed: int = 0,
) -> PreconditionedSharpnessResult:
    """Compute the largest eigenvalues of P^-1 H and compare them with the optimizer's limit of stability.

    P^-1 H has the eigenvalues of the symmetric P^-1/2 H P^-1/2, which is what Lanczos sees. P comes from the objective's
    ``decay_scale``, AdamW's frozen sqrt(v) + eps.

    Args:
        probe: the model, batches and objective; batches are split over ranks.
        lr: the learning rate at the point measured; None leaves the threshold out.
        beta1: AdamW's first momentum coefficient, in [0, 1).
        preconditioner: ``adamw``, ``identity``, or ``auto``: ``adamw`` where its state is at hand.
        k: how many eigenvalues.
        tol: relative error at which to stop.
        parameters: a subset, see `hessian_eigenvalues`.
        dtype: ``float32`` or ``float64``; None for the model's own.
        bn: BatchNorm on running statistics (``eval``) or on each batch's (``batch``).
        micro_batch: images held at once; None for a whole batch.
        max_products: the most products.
        max_memory: bytes the Lanczos basis may take.
        seed: of the start vector.

    Raises:
        ValueError: ``adamw`` without a ``decay_scale``, an ``lr`` that is not positive, ``beta1`` outside [0, 1); and as
            `hessian_eigenvalues`.
        NumericalError: a loss that is not finite.

    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022); PAPER.md section 9.
    """
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"Expected lr to be positive or None, received {lr}.")
    if not 0 <= beta1 < 1:
        raise ValueError(f"Expected beta1 in [0, 1), received {beta1}.")
    given = probe.objective.decay_scale
    chosen = _choice(preconditioner, given)
    solving = {"k": k, "which": "LA", "tol": tol, "max_products": max_products, "seed": seed}
    with curvatures(probe, parameters=parameters, dtype=dtype, bn=bn, micro_batch=micro_batch, seed=seed) as made:
        mean = made.mean()
        scale = [_inverse_root(name, p, given if chosen == "adamw" else None) for name, p in made.parameters.items()]
        pairs = scaled_eigenvalues(mean, scale, shared=True, max_memory=max_memory, **solving)
        threshold = 2 * (1 + beta1) / ((1 - beta1) * lr) if lr else float("nan")
        return PreconditionedSharpnessResult(
            eigenvalues=pairs.values,
            residuals=pairs.residuals,
            converged=pairs.converged,
            threshold=threshold,
            ratio=float(pairs.values[0]) / threshold,
            lr=lr or float("nan"),
            beta1=beta1,
            preconditioner=chosen,
            n_products=pairs.n_products,
            card=made.card({**solving, "preconditioner": chosen}),
        )


def _choice(preconditioner: str, given: Mapping[str, Tensor] | None) -> str:
    if preconditioner not in ("auto", "adamw", "identity"):
        raise ValueError(f"Expected preconditioner to be auto, adamw or identity, received {preconditioner!r}.")
    if preconditioner == "adamw" and given is None:
        raise ValueError(
            "Expected Objective(decay_scale=...) (AdamW's sqrt(v) + eps by parameter name) with preconditioner='adamw', "
            "received None: measure a checkpoint that holds the optimizer's state, or use preconditioner='identity'."
        )
    return preconditioner if preconditioner != "auto" else "identity" if given is None else "adamw"


def _inverse_root(name: str, p: Tensor, scale: Mapping[str, Tensor] | None) -> Tensor:
    if scale is None:
        return torch.ones_like(p)
    if name not in scale:
        raise ValueError(f"Expected decay_scale for every parameter, received none for {name!r}.")
    if not bool((scale[name] > 0).all()):
        raise ValueError(f"Expected a positive decay_scale (sqrt(v) + eps), received one with zeros for {name!r}.")
    return scale[name].to(p.device).double().rsqrt()
