"""The curvature of the data term plus the optimizer's own decay, and the optimizer's metric P, on a factory of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitscope.core.optimizer_state import OptimizerState
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.curvature.row_slices import rows_of, whole_name, whole_of
from vitscope.runtime.errors import CheckpointError


def damaged_state(state: OptimizerState, error: Exception) -> CheckpointError:
    """Return the error of a state that no optimizer writes."""
    reason = f"the state of {state.name} is damaged ({type(error).__name__}: {error})"
    return CheckpointError("ckpt_path", None, reason, "use another checkpoint, or preconditioner=identity")


def product_with_decay(operator: Curvature, decay: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product with the data term's curvature plus the diagonal ``decay (size,)``."""
    return lambda v: operator.data_product(v).addcmul_(v, decay)


def flat_values(operators: Curvatures, values: Mapping[str, float]) -> Tensor:
    """Return one number a parameter, expanded to ``(size,)``.

    Raises:
        ValueError: A parameter without a number, which the optimizer does not train.
    """
    if missing := [name for name, p in operators.parameters.items() if whole_name(name, p) not in values]:
        raise _untrained(missing[0])
    return torch.cat(
        [torch.full((p.numel(),), values[whole_name(name, p)]).to(p) for name, p in operators.parameters.items()]
    )


def _untrained(name: str) -> ValueError:
    return ValueError(
        f"Expected an optimizer of every parameter analyzed, received one that does not train {name!r}: choose its parameters "
        "with parameters=."
    )


def inverse_root(name: str, p: Tensor, scale: Mapping[str, Tensor] | None) -> Tensor:
    """Return the entries of P^-1/2 for a parameter, in its shape or broadcastable; ones without a scale."""
    if scale is None:
        return torch.ones_like(p)
    name = whole_name(name, p)
    if name not in scale:
        raise _untrained(name)
    if not bool((scale[name] > 0).all()):
        raise ValueError(f"Expected a positive scale (sqrt(v) + eps), received one with zeros for {name!r}.")
    is_expanded = scale[name].ndim > 0 and len(scale[name]) == len(whole_of(p))  # not one number for a whole tensor
    return (rows_of(scale[name], p) if is_expanded else scale[name]).to(p.device).double().rsqrt()
