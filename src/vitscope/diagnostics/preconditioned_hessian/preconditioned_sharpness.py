"""Largest eigenvalue of the preconditioned Hessian, beside the limit of stability of the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.optimizer_state import OptimizerState, of_optimizer
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.diagnostics.preconditioned_hessian._optimizer_metric import (
    damaged_state,
    flat_values,
    inverse_root,
    product_with_decay,
)
from vitscope.linalg.curvature.curvature_options import CurvatureOptions, SearchArguments, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, lanczos_products, mean_products
from vitscope.linalg.optimizer_stability import StabilityLimit, stability_limit
from vitscope.linalg.preconditioned_operator import scaled_eigenvalues
from vitscope.runtime.value_ranges import PositiveInt, ShareBelowOne


@dataclass(frozen=True)
class PreconditionedSharpnessResult(Result):
    """Eigenvalues of P^-1 H, with P the optimizer's preconditioner, and what its iteration bears.

    Attributes:
        eigenvalues: (k,) the largest, descending.
        residuals: (k,) of the symmetric form P^-1/2 H P^-1/2.
        converged: (k,) booleans.
        threshold: Above it the linearized full-batch iteration with frozen second moments diverges, see
            `vitscope.linalg.optimizer_stability`: 2 (1 + beta1) / ((1 - beta1) lr) for Adam and AdamW (38 / lr for beta1 = 0.9),
            2 (1 + m) / lr for SGD with momentum m (3.8 / lr for 0.9). NaN where it is unknown, infinite at rate 0.
        ratio: Largest eigenvalue / threshold; NaN where that is unknown.
        lr: The learning rate, NaN where it is unknown.
        beta1: The momentum coefficient, NaN where it is unknown or there is none.
        preconditioner: ``adamw`` (also of Adam), ``identity`` (also of SGD), ``nadam``, ``rmsprop`` or ``adagrad``.
        n_products: Products with the Hessian.
        optimizer: The optimizer's class, empty where none is known.
        limit: The threshold's formula, or why it is unknown.
        card: Conditions of the measurement.
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
    optimizer: str = ""
    limit: str = ""
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


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the products of the search."""
    k = int(options["k"])
    products = lanczos_products(workload, options, k)
    return MeasureCost(
        mean_products(workload, options, products, gradients=1),
        held_bytes=2.0 * workload.parameter_bytes,  # P^-1/2, and a coupled decay
        held_bytes_shared=basis_bytes(workload, products.expected),
        result_bytes=ENTRY * 2 * k + k,  # a flag takes a byte
    )


@declares_cost(_cost)
@record_options
@curvature_arguments()
def preconditioned_sharpness(
    probe: Probe,
    *,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    beta1: ShareBelowOne | None = None,
    preconditioner: Literal["auto", "adamw", "identity"] = "auto",
    k: PositiveInt = 1,
    **curvature: Unpack[SearchArguments],
) -> PreconditionedSharpnessResult:
    """Compute the largest eigenvalues of P^-1 H and compare them with the optimizer's limit of stability.

    P^-1 H has the eigenvalues of the symmetric P^-1/2 H P^-1/2, which is what Lanczos sees. With ``auto`` the optimizer is the
    one given, or that of the run's checkpoint: its class, its hyper-parameters by group and its state, whatever form of L2 the
    objective has. H is then the Hessian of the data term plus the optimizer's own coupled weight decay; decoupled decay scales
    P by 1 - lr wd / 2, which is exact, and groups of different rates or momenta scale P by what their limits differ. Without
    an optimizer, H is the objective's, and P its ``decay_scale`` (AdamW's frozen sqrt(v) + eps) where there is one.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        optimizer: Optimizer of the model, at the point measured; None for that of the checkpoint the probe was made from.
        lr: The learning rate in place of the optimizer's; without an optimizer, None leaves the threshold out.
        beta1: For use without an optimizer: Adam's first momentum coefficient, None for 0.9; with the identity SGD's momentum,
            None leaves the threshold out.
        preconditioner: ``auto``; or, of a stated optimizer instead of the run's: ``adamw`` (its state is needed), ``identity``.
        k: Number of eigenvalues (``n_top`` is accepted too).
        curvature: ``tol``, ``parameters``, ``dtype``, ``bn``, ``micro_batch``, ``max_products``, ``max_memory``, ``basis``,
            ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: ``adamw`` without its state, an ``lr`` that is not positive, ``beta1`` outside [0, 1); and as
            `hessian_eigenvalues`.
        CheckpointError: An optimizer state that is damaged.
        NumericalError: A loss that is not finite.

    Source: Cohen et al., Adaptive gradient methods at the edge of stability (2022).
    """
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"Expected lr to be positive or None, received {lr}.")
    if beta1 is not None and not 0 <= beta1 < 1:
        raise ValueError(f"Expected beta1 in [0, 1) or None, received {beta1}.")
    if preconditioner not in ("auto", "adamw", "identity"):
        raise ValueError(f"Expected preconditioner to be auto, adamw or identity, received {preconditioner!r}.")
    plan = _plan(probe, optimizer, lr, beta1, preconditioner)
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options) as operators:
        mean = operators.mean()
        scale = [inverse_root(name, p, plan.scale) for name, p in operators.parameters.items()]
        product = None if plan.decay is None else product_with_decay(mean, flat_values(operators, plan.decay))
        pairs = scaled_eigenvalues(
            mean,
            scale,
            product,
            k=k,
            which="LA",
            shared=True,
            memory=operators.basis_memory(shared=True),
            **options.search(),
        )
        facts = {
            "k": k,
            "which": "LA",
            **options.values("tol", "max_products", "seed"),
            "preconditioner": plan.preconditioner,
            "optimizer": plan.optimizer,
        }
        card = operators.card(facts, **plan.l2)
    ratio = float(pairs.values[0]) / plan.threshold
    return PreconditionedSharpnessResult(
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        converged=pairs.converged,
        threshold=plan.threshold,
        ratio=ratio,
        lr=plan.lr,
        beta1=plan.beta1,
        preconditioner=plan.preconditioner,
        n_products=pairs.n_products,
        optimizer=plan.optimizer,
        limit=plan.limit,
        card=card,
    )


@dataclass(frozen=True)
class _Plan:
    """Preconditioner P, L2 term of H, and the limit that belongs to them.

    ``scale`` is P by parameter name (None: the identity), ``decay`` the coupled decay that replaces the objective's L2 term
    (None: the objective's own), ``l2`` how the card names that.
    """

    preconditioner: str
    limit: str
    threshold: float = float("nan")
    lr: float = float("nan")
    beta1: float = float("nan")
    optimizer: str = ""
    scale: Mapping[str, Tensor] | None = None
    decay: Mapping[str, float] | None = None
    l2: Mapping[str, object] = field(default_factory=dict)


def _plan(
    probe: Probe, optimizer: Optimizer | None, lr: float | None, beta1: float | None, preconditioner: str
) -> _Plan:
    state = of_optimizer(optimizer, probe.model) if optimizer is not None else probe.optimizer()
    adam = state is not None and state.name in ("Adam", "AdamW") and any(p.state for p in state.parameters.values())
    if state is None or preconditioner == "identity" or (preconditioner == "adamw" and not adam):
        return _stated(probe.objective.decay_scale, lr, beta1, preconditioner)
    try:
        limit = stability_limit(state, lr)
    except LookupError as error:
        if isinstance(error, KeyError):
            raise damaged_state(state, error) from None
        return _unknown(probe, state, str(error), lr)
    except (TypeError, AttributeError, ValueError) as error:
        raise damaged_state(state, error) from None
    if beta1 is not None and beta1 != limit.beta1:
        warnings.warn(
            f"beta1={beta1:g} is not used: {limit.name} has {limit.beta1:g} in its state", UserWarning, stacklevel=4
        )
    return _of_limit(limit)


def _of_limit(limit: StabilityLimit) -> _Plan:
    coupled = sorted(set(limit.decay.values()))
    scale = {name: critical / limit.unit for name, critical in limit.critical.items()}
    names = {"AdamW": "adamw", "Adam": "adamw", "SGD": "identity"}
    return _Plan(
        preconditioner=names.get(limit.name, limit.name.lower()),
        scale=scale,
        decay=limit.decay,
        threshold=limit.threshold,
        lr=limit.lr,
        beta1=limit.beta1,
        optimizer=limit.name,
        limit=limit.formula,
        l2={"l2": "the optimizer's own", "weight_decay": coupled[-1]},
    )


def _stated(scale: Mapping[str, Tensor] | None, lr: float | None, beta1: float | None, preconditioner: str) -> _Plan:
    """Return the plan of an optimizer that is not at hand: AdamW's by its scale, or gradient descent."""
    if preconditioner == "adamw" and scale is None:
        raise ValueError(
            "Expected Objective(decay_scale=...) (AdamW's sqrt(v) + eps by parameter name) with preconditioner='adamw', "
            "received None: measure a checkpoint that holds the optimizer's state, or use preconditioner='identity'."
        )
    if preconditioner == "identity" or scale is None:
        plan = _Plan("identity", "unknown: no optimizer was given (optimizer=, or lr= and SGD's momentum as beta1=)")
        if beta1 is not None:
            plan = replace(plan, beta1=beta1)
        if lr is not None and beta1 is not None:
            plan = replace(plan, limit="2 (1 + m) / lr", threshold=2 * (1 + beta1) / lr)
    else:
        beta1 = 0.9 if beta1 is None else beta1
        plan = _Plan("adamw", "unknown: no lr is given", beta1=beta1, scale=scale)
        if lr is not None:
            limit = "2 (1 + beta1) / ((1 - beta1) lr)"
            plan = replace(plan, limit=limit, threshold=2 * (1 + beta1) / ((1 - beta1) * lr))
    return replace(plan, lr=lr or float("nan"))


def _unknown(probe: Probe, state: OptimizerState, reason: str, lr: float | None) -> _Plan:
    """Return the plan for eigenvalues of the objective's own Hessian, without a limit, and say so."""
    warnings.warn(
        f"the limit of stability is unknown: {reason}; eigenvalues are the Hessian's own", UserWarning, stacklevel=5
    )
    return _Plan("identity", f"unknown: {reason}", lr=lr or float("nan"), optimizer=state.name)
