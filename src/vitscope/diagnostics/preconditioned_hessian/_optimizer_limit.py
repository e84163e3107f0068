"""The limit of stability of an optimizer's next step, and the metric and decay that belong to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vitscope.core.optimizer_state import OptimizerState
from vitscope.diagnostics.preconditioned_hessian._optimizer_metric import damaged_state
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.krylov_basis import norm
from vitscope.linalg.optimizer_stability import StabilityLimit, coupled_decay, sam_limit, stability_limit


@dataclass(frozen=True)
class OptimizerLimit:
    """Stability limit of an optimizer, and the operator whose largest eigenvalue it bounds.

    Attributes:
        threshold: The limit; NaN where it is unknown.
        formula: Formula of the threshold, or the reason why it is unknown.
        lr: Learning rate of the next step.
        optimizer: Class of the optimizer, with SAM around it.
        preconditioner: Name of P.
        scale: P by parameter name; None for the identity.
        decay: Coupled decay by parameter name; None leaves the objective's own L2 term.
        l2: Name of the L2 term on the card.
    """

    threshold: float
    formula: str
    lr: float
    optimizer: str
    preconditioner: str
    scale: Mapping[str, Tensor] | None
    decay: Mapping[str, float] | None
    l2: Mapping[str, object]


def limit_of(state: OptimizerState | None, operator: Curvature) -> OptimizerLimit:
    """Return the limit of an optimizer's next step; NaN with the reason where none is known.

    Args:
        state: The optimizer at the point measured; None where there is none.
        operator: The Hessian, whose gradient SAM's limit takes the norm of.

    Raises:
        CheckpointError: A state that no optimizer writes.
    """
    if state is None:
        return _unknown("no optimizer was given (optimizer=)", float("nan"), "", None)
    lr = next((float(p.group["lr"]) for p in state.parameters.values() if "lr" in p.group), float("nan"))
    around = state.ascent_radius > 0
    name = f"SAM around {state.name}" if around else state.name
    try:
        limit = stability_limit(replace(state, unknown="") if around else state, bias_correction=True)
        if not around:
            return _known(limit, name)
        gradient_norm = norm(operator.gradient(data_only=True))
        threshold = sam_limit(limit, state.ascent_radius, gradient_norm)
    except LookupError as error:
        if isinstance(error, KeyError):
            raise damaged_state(state, error) from None
        return _unknown(str(error), lr, name, coupled_decay(state))
    except (TypeError, AttributeError, ValueError) as error:
        raise damaged_state(state, error) from None
    formula = f"|g| / (2 rho) (sqrt(1 + 4 rho L / |g|) - 1), L = {limit.formula}"
    return replace(_known(limit, name), threshold=threshold, formula=formula)


def _known(limit: StabilityLimit, name: str) -> OptimizerLimit:
    scale = {parameter: critical / limit.unit for parameter, critical in limit.critical.items()}
    is_identity = limit.name == "SGD" and all(float(p) == 1.0 for p in scale.values())
    names = {"AdamW": "adamw", "Adam": "adamw", "SGD": "identity" if is_identity else "groups"}
    return OptimizerLimit(
        threshold=limit.threshold,
        formula=limit.formula,
        lr=limit.lr,
        optimizer=name,
        preconditioner=names.get(limit.name, limit.name.lower()),
        scale=None if is_identity else scale,
        decay=limit.decay,
        l2=_stated_decay(limit.decay),
    )


def _unknown(reason: str, lr: float, name: str, decay: Mapping[str, float] | None) -> OptimizerLimit:
    """Return a limit that is not known; a known optimizer's decay is in H all the same, as at the other steps of a series."""
    return OptimizerLimit(float("nan"), f"unknown: {reason}", lr, name, "identity", None, decay, _stated_decay(decay))


def _stated_decay(decay: Mapping[str, float] | None) -> Mapping[str, object]:
    return {} if decay is None else {"l2": "the optimizer's own", "weight_decay": max(decay.values())}


def warn_of_unknown(limit: OptimizerLimit, step: int) -> None:
    """Warn where no limit is known of an optimizer that has begun: before, an adaptive one has no second moments."""
    is_unknown = limit.formula.startswith("unknown") and limit.optimizer
    if not is_unknown or (step == 0 and "has made no step" in limit.formula):
        return
    warnings.warn(f"the limit of stability is {limit.formula}; eigenvalues are the Hessian's own", stacklevel=4)
