"""An operator seen through a diagonal change of variables: v -> D C D v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.start_vector import start_vector
from vitscope.linalg.eigensolver import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.krylov_basis import norm


def scaled_eigenvalues(
    operator: Curvature,
    scale: Sequence[Tensor],
    product: Callable[[Tensor], Tensor] | None = None,
    *,
    start: Tensor | None = None,
    **solving: Any,
) -> Eigenpairs:
    """Return extreme eigenvalues of D C D, D diagonal with the entries ``scale`` (one tensor a parameter).

    Where C is a Hessian this is the Hessian in the coordinates u with w = w0 + D u.

    Args:
        operator: C.
        scale: D's entries in the parameters' shapes.
        product: ``v -> C v`` where C is not the operator itself but its data term with another L2 term.
        start: First vector, in the coordinates u; None for the gradient's direction with a random part.
        solving: Keyword arguments of `extreme_eigenvalues`.
    """
    d = torch.cat([part.expand(p.shape).reshape(-1) for part, p in zip(scale, operator.parameters.values())])
    d = d.to(operator.device, operator.dtype)
    if start is None:
        start = start_vector(operator) * d
    if not norm(start) > 0:
        start = torch.zeros_like(start)
    multiply = product or operator
    return extreme_eigenvalues(lambda v: multiply(v * d).mul_(d), start, **solving)
