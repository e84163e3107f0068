"""Gradient and Hessian of the L2 term in closed form, so that no product has to differentiate it.

half_sq: wd w and wd I. sum_norm: wd w/|w| and wd (I - u u^T)/|w| with u = w/|w| for each tensor; a tensor that is exactly
zero has no derivative there and contributes zero. adamw: wd s w and wd diag(s), s = sqrt(v) + eps frozen. For some rows of a
tensor these are the blocks of the whole tensor's: |w| stays the norm of all of its rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitscope.core.objective import Objective
from vitscope.linalg.curvature.row_slices import rows_of, whole_name, whole_of


def acts(objective: Objective) -> bool:
    """Return whether the objective has an L2 term at all."""
    return objective.l2 != "none" and objective.weight_decay != 0.0


def l2_shift(objective: Objective) -> float:
    """Return the part of the L2 term's Hessian that is a multiple of the identity: wd for half_sq."""
    return objective.weight_decay if objective.l2 == "half_sq" else 0.0


def l2_gradient(objective: Objective, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the L2 term's gradient, one tensor a parameter."""
    parts = [p.detach() for p in parameters.values()]
    if not acts(objective):
        return [torch.zeros_like(p) for p in parts]
    if objective.l2 == "sum_norm":
        return [p.detach() * (objective.weight_decay * _inverse_norm(p)) for p in parameters.values()]
    return [p * scale for p, scale in zip(parts, _scales(objective, parameters))]


def add_l2_product(objective: Objective, parameters: Mapping[str, Tensor], v: Sequence[Tensor], out: Tensor) -> Tensor:
    """Add the L2 term's Hessian times ``v`` (in the parameters' shapes) to ``out (size,)`` in place; return ``out``."""
    if not acts(objective):
        return out
    parts = out.split([part.numel() for part in v])
    if objective.l2 == "sum_norm":
        for target, p, part in zip(parts, parameters.values(), v):
            weight = p.detach()
            inverse = _inverse_norm(p)
            along = (weight.double() * part).sum() * inverse.double().square()  # <w, v> / |w|^2
            rest = part - weight * along.to(part.dtype)
            target += (rest * (objective.weight_decay * inverse)).reshape(-1)
        return out
    for target, part, scale in zip(parts, v, _scales(objective, parameters)):
        if isinstance(scale, Tensor):
            target += (part * scale).reshape(-1)
        else:
            target.add_(part.reshape(-1), alpha=scale)
    return out


def warn_of_sum_norm(objective: Objective, parameters: Mapping[str, Tensor]) -> None:
    """Warn that un-squared norms bend the objective by wd/|w| across each tensor, the more the smaller it is."""
    if objective.l2 != "sum_norm" or objective.weight_decay == 0.0:
        return
    norms = {name: whole_of(p).double().norm().item() for name, p in parameters.items() if p.numel() > 1}
    name, norm = min(((n, x) for n, x in norms.items() if x > 0), key=lambda pair: pair[1], default=("", 0.0))
    if norm > 0:
        warnings.warn(
            f"l2='sum_norm' adds curvature of its own: up to {objective.weight_decay / norm:.3g} (from {name!r} of norm "
            f"{norm:.3g}); l2_contribution states its share of every eigenvalue. Use l2='half_sq' for spectra.",
            UserWarning,
            stacklevel=5,
        )


def _scales(objective: Objective, parameters: Mapping[str, Tensor]) -> list[Tensor | float]:
    decay = objective.weight_decay
    if objective.l2 == "half_sq":
        return [decay] * len(parameters)
    assert objective.decay_scale is not None  # Objective refuses adamw without it
    names = {name: whole_name(name, p) for name, p in parameters.items()}
    missing = [name for name in names.values() if name not in objective.decay_scale]
    if missing:
        raise ValueError(f"Expected decay_scale for every parameter, received none for {missing[0]!r}.")
    return [decay * rows_of(objective.decay_scale[names[name]], p).to(p) for name, p in parameters.items()]


def _inverse_norm(p: Tensor) -> Tensor:
    """Return 1 / |w| of the whole tensor that a parameter is, or is some rows of; 0 where it is zero."""
    norm = whole_of(p).double().norm()
    return torch.where(norm > 0, 1 / norm, torch.zeros_like(norm)).to(p.dtype)
