"""An operator seen through a diagonal change of variables: v -> D C D v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitscope.linalg.basis import norm
from vitscope.linalg.curvatures import start_vector
from vitscope.linalg.extreme import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.hvp import Curvature


def scaled_eigenvalues(operator: Curvature, scale: Sequence[Tensor], **solving: object) -> Eigenpairs:
    """Return extreme eigenvalues of D C D, D diagonal with the entries ``scale`` (one tensor a parameter).

    Where C is a Hessian this is the Hessian in the coordinates u with w = w0 + D u.

    Args:
        operator: C.
        scale: D's entries in the parameters' shapes.
        solving: as for `extreme_eigenvalues`.
    """
    d = torch.cat([part.expand(p.shape).reshape(-1) for part, p in zip(scale, operator.parameters.values())])
    d = d.to(operator.device, operator.dtype)
    start = start_vector(operator) * d
    if not norm(start) > 0:
        start = torch.zeros_like(start)
    return extreme_eigenvalues(lambda v: operator(v * d).mul_(d), start, **solving)  # type: ignore[arg-type]
