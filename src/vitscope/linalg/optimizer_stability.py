"""Limits of stability: the curvature up to which the iteration of an optimizer is stable.

On a quadratic w^T H w / 2, full batch, with the second moments frozen, an optimizer of torch.optim is a linear iteration. Of one
weight with the curvature h it diverges where h passes a critical curvature; each follows from the characteristic polynomial at
z = -1, where its root leaves the unit disc (eta the rate, wd the decay, p the preconditioner, a = 1 - eta wd where the decay is
decoupled and 1 elsewhere):

- SGD: z^2 - (1 + m - eta (1 - d) h) z + m gives 2 (1 + m) / ((1 - d) eta), momentum m and dampening d; torch's buffer is
  m b + (1 - d) g, without a factor 1 - m. Without momentum there is no buffer and no dampening: 2 / eta.
- SGD, Nesterov: z^2 - (1 + m) (1 - eta h) z + m (1 - eta h) gives 2 (1 + m) / ((1 + 2 m) eta).
- Adam, AdamW: z^2 - (a + b - eta (1 - b) h / p) z + a b gives p (1 + a) (1 + b) / ((1 - b) eta), with b = beta1 and
  p = sqrt(v / (1 - beta2^t)) + eps (the largest v so far with amsgrad). The bias correction of the first moment, 1 / (1 - b^t),
  is transient and taken as 1, unless ``bias_correction`` asks for the limit of the next step t: the step then has the factor
  1 / (1 - b^t), and the limit 1 - b^t. Cohen et al. (2022) have this factor in their preconditioner.
- NAdam: p (1 + a) (1 + b) / ((1 + b - 2 mu b) eta), with mu = b (1 - 0.96^(t md) / 2) of the next step t, md the momentum decay.
- RMSprop: 2 (1 + m) p / eta, p = sqrt(v) + eps, v less the squared mean of gradients where centered.
- Adagrad: 2 p / eta with p = sqrt(sum) + eps and eta = lr / (1 + (t - 1) lr_decay) of the next step t.

Coupled decay adds wd to h. Many weights: with L the diagonal of critical curvatures, the quadratic eigenvalue problem has
symmetric coefficients (multiplied by a diagonal), so that roots leave the unit disc at z = -1 alone, and the iteration is stable
where the largest eigenvalue of L^-1/2 (H + wd) L^-1/2 is below 1; rates, decays and momenta of several groups may differ
(Nesterov: not the momenta).

SAM around SGD takes the gradient at w + rho g / |g|. Of a quadratic with Hessian H that is H w + rho / |g| H^2 w, so that with
|g| held the iteration is the base optimizer's with the curvature h + rho h^2 / |g|, and h is critical where that equals the
base optimizer's limit L: h = |g| / (2 rho) (sqrt(1 + 4 rho L / |g|) - 1); for L = 2 / eta this is the SAM-edge of Long and
Bartlett (2023). The limit falls with |g|. Muon's step has one length whatever the gradient's, so that it has no limit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitscope.core.optimizer_state import OptimizerState, ParameterState


@dataclass(frozen=True)
class StabilityLimit:
    """The critical curvature of every weight, and the same as a preconditioner and one threshold.

    Attributes:
        name: The optimizer's class.
        critical: The critical curvature by parameter name, float64 and broadcastable; infinite where the weight does not move.
        decay: Coupled decay by parameter name, which adds to the curvature.
        unit: Unit of ``critical``: divided by it they are the preconditioner P of which ``threshold`` is the limit.
        threshold: Threshold of the first group that moves, without p: 2 (1 + beta1) / ((1 - beta1) lr) for Adam; infinite where
            the rate of every group is 0, and ``critical`` is then that of a rate of 1.
        lr: The rate of that group.
        beta1: Momentum coefficient of that group, NaN where it has none.
        formula: Formula of the threshold.
    """

    name: str
    critical: Mapping[str, Tensor]
    decay: Mapping[str, float]
    unit: float
    threshold: float
    lr: float
    beta1: float
    formula: str


def stability_limit(
    optimizer: OptimizerState, lr: float | None = None, *, bias_correction: bool = False
) -> StabilityLimit:
    """Return the limit of a known optimizer.

    Args:
        optimizer: Class, hyper-parameters and state.
        lr: A rate in place of every group's own.
        bias_correction: Whether Adam's limit is that of its next step, whose first moment is divided by 1 - beta1^t; else that
            of many steps later.

    Raises:
        LookupError: There is no known limit; the message says why.
        KeyError, TypeError, AttributeError: A state that the optimizer does not write.
    """
    _refuse_without_limit(optimizer)
    parameters = optimizer.parameters
    rates = {name: _rate(optimizer.name, p, lr) for name, p in parameters.items()}
    is_resting = not any(rates.values())
    if is_resting:
        rates = dict.fromkeys(rates, 1.0)
    factors = {name: _factor(optimizer.name, p, bias_correction) for name, p in parameters.items()}
    first = next(name for name in parameters if rates[name] > 0)
    group = parameters[first].group
    unit = factors[first] / rates[first]
    limit = StabilityLimit(
        name=optimizer.name,
        critical={name: _critical(optimizer.name, p, rates[name], factors[name]) for name, p in parameters.items()},
        decay={name: _coupled(optimizer.name, p) for name, p in parameters.items()},
        unit=unit,
        threshold=unit,
        lr=float(group["lr"] if lr is None else lr),
        beta1=float(group["betas"][0] if "betas" in group else group.get("momentum", math.nan)),
        formula=_formula(optimizer.name, group, bias_correction),
    )
    if is_resting:
        return replace(limit, threshold=math.inf, lr=0.0, formula="infinite: the rate is 0 (give lr)")
    return limit


def _refuse_without_limit(optimizer: OptimizerState) -> None:
    """Raise LookupError, with the reason, for an optimizer of which no limit is known."""
    if optimizer.unknown:
        raise LookupError(optimizer.unknown)
    parameters = optimizer.parameters.values()
    if any(p.group.get("maximize") for p in parameters):
        raise LookupError("it maximizes")
    if optimizer.name == "SGD" and _mixes_nesterov(parameters):
        raise LookupError("groups with Nesterov's momentum differ in it")
    if any(float(p.group.get("dampening") or 0.0) >= 1 for p in parameters):
        raise LookupError("dampening of 1 or more leaves nothing of the gradient")
    if optimizer.name != "SGD" and not any(p.state for p in parameters):
        raise LookupError(f"{optimizer.name} has made no step, so it has no preconditioner")


def _critical(name: str, p: ParameterState, rate: float, factor: float) -> Tensor:
    """Return the critical curvature of a parameter's weights without coupled decay; infinite where they do not move."""
    has_no_gradient = name != "SGD" and not p.state  # SGD without momentum never has a state
    if rate == 0 or has_no_gradient:
        return torch.full((), math.inf, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64) if name == "SGD" else _preconditioner(name, p)
    shrinking = 1.0 - rate * _decoupled(name, p) / 2  # (1 + a) / 2
    return scale * (shrinking * factor / rate)


def sam_limit(base: StabilityLimit, radius: float, gradient_norm: float) -> float:
    """Return the critical curvature of sharpness-aware minimization around SGD, the coupled decay included in it.

    Args:
        base: Limit of the optimizer that makes the steps.
        radius: Radius rho of the ascent.
        gradient_norm: |g| of the data term, which the ascent divides by; 0 means no ascent.

    Raises:
        LookupError: The base optimizer has a preconditioner, or groups of different limits or decays.
    """
    critical = {float(value) for value in base.critical.values() if value.ndim == 0}
    if base.name != "SGD" or len(critical) != 1 or len(set(base.decay.values())) != 1:
        raise LookupError(
            f"SAM's limit is derived around SGD with one group of parameters, not around this {base.name}"
        )
    (limit,), (decay,) = critical, set(base.decay.values())
    if not gradient_norm > 0 or base.threshold == float("inf"):
        return base.threshold
    scale = gradient_norm / (2 * radius)
    return scale * (math.sqrt(1 + 2 * max(limit - decay, 0.0) / scale) - 1) + decay


#: thresholds by optimizer: of SGD without Nesterov's momentum, of Adam without the correction of its bias
_FORMULAS = {
    "SGD": "2 (1 + m) / ((1 - dampening) lr)",
    "Adam": "2 (1 + beta1) / ((1 - beta1) lr)",
    "AdamW": "2 (1 + beta1) / ((1 - beta1) lr)",
    "NAdam": "2 (1 + beta1) / ((1 + beta1 - 2 mu beta1) lr)",
    "RMSprop": "2 (1 + m) / lr",
    "Adagrad": "2 (1 + t lr_decay) / lr",
}


def _formula(name: str, group: Mapping[str, Any], bias_correction: bool) -> str:
    if bias_correction and name in ("Adam", "AdamW"):
        return "2 (1 + beta1) (1 - beta1^t) / ((1 - beta1) lr)"
    return "2 (1 + m) / ((1 + 2 m) lr)" if group.get("nesterov") else _FORMULAS[name]


def coupled_decay(optimizer: OptimizerState) -> dict[str, float] | None:
    """Return the decay that a known optimizer adds to the gradient, by parameter name; None of an unknown one."""
    if optimizer.unknown and not optimizer.ascent_radius:
        return None
    return {name: _coupled(optimizer.name, p) for name, p in optimizer.parameters.items()}


def adam_scale(optimizer: OptimizerState) -> dict[str, Tensor] | None:
    """Return sqrt(v) + eps by parameter name, v corrected for its bias; None for another optimizer or before its first step.

    A parameter that never had a gradient has the scale eps.
    """
    if optimizer.name not in ("Adam", "AdamW") or not any(p.state for p in optimizer.parameters.values()):
        return None
    scales = {}
    for name, p in optimizer.parameters.items():
        if p.state:
            scales[name] = _preconditioner(optimizer.name, p)
        else:
            scales[name] = torch.full(p.shape, float(p.group["eps"]), dtype=torch.float64)
    return scales


def _mixes_nesterov(parameters: Collection[ParameterState]) -> bool:
    """Whether groups differ in their momentum and one of them takes Nesterov's."""
    momenta = {(bool(p.group["nesterov"]), float(p.group["momentum"])) for p in parameters}
    return len(momenta) > 1 and any(nesterov for nesterov, _ in momenta)


def _rate(name: str, p: ParameterState, lr: float | None) -> float:
    rate = float(p.group["lr"] if lr is None else lr)
    if name == "Adagrad":
        rate /= 1 + float(p.state.get("step", 0)) * float(p.group["lr_decay"])
    return rate


def _factor(name: str, p: ParameterState, bias_correction: bool) -> float:
    """Return the critical curvature times the rate over the preconditioner, without decay."""
    group = p.group
    next_step = float(p.state.get("step", 0)) + 1
    if name in ("Adam", "AdamW"):
        beta = float(group["betas"][0])
        correction = 1 - beta**next_step if bias_correction else 1.0
        return 2 * (1 + beta) / (1 - beta) * correction
    if name == "NAdam":
        beta = float(group["betas"][0])
        mu = beta * (1 - 0.5 * 0.96 ** (next_step * float(group["momentum_decay"])))
        return 2 * (1 + beta) / (1 + beta - 2 * mu * beta)
    m = float(group.get("momentum", 0.0))
    if name == "SGD" and group["nesterov"]:
        return 2 * (1 + m) / (1 + 2 * m)
    if name == "SGD" and m:  # without momentum there is no dampening
        return 2 * (1 + m) / (1 - float(group["dampening"]))
    return 2 * (1 + m)


def _preconditioner(name: str, p: ParameterState) -> Tensor:
    """Return p of the module's docstring for an optimizer with second moments, float64 in the shape of the parameter."""
    group, state = p.group, p.state
    eps = float(group["eps"])
    if name in ("Adam", "AdamW", "NAdam"):
        square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        square = square.double() / (1 - float(group["betas"][1]) ** float(state["step"]))
        return square.sqrt() + eps
    if name == "Adagrad":
        return state["sum"].double().sqrt() + eps
    square = state["square_avg"].double()
    if group["centered"]:
        square = (square - state["grad_avg"].double().square()).clamp(min=0.0)
    return square.sqrt() + eps


def _coupled(name: str, p: ParameterState) -> float:
    """Return the decay that is added to the gradient."""
    return 0.0 if _is_decoupled(name, p) else float(p.group.get("weight_decay", 0.0))


def _decoupled(name: str, p: ParameterState) -> float:
    return float(p.group.get("weight_decay", 0.0)) if _is_decoupled(name, p) else 0.0


def _is_decoupled(name: str, p: ParameterState) -> bool:
    return name == "AdamW" or (name == "NAdam" and bool(p.group.get("decoupled_weight_decay")))
