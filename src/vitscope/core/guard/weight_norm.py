"""Weight normalization that can be differentiated twice.

``torch._weight_norm`` (both parametrizations of ``torch.nn.utils``) keeps the norms of its forward pass as constants in the
derivative of its backward pass, along the first and the last axis: second derivatives are then wrong, and not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: torch calls it private, and both of its public parametrizations call it
_TORCH_S_OWN = cast(Any, torch)._weight_norm


class DifferentiableWeightNorm(TorchFunctionMode):
    """Within this context ``torch._weight_norm`` is ``v g / |v|`` by operations with right derivatives of every order."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or `weight_norm` in the place of torch's."""
        replacement = weight_norm if func is _TORCH_S_OWN else func
        return replacement(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``v`` scaled to the Euclidean norms ``g`` of its slices along axis ``dim`` (-1: of the whole tensor)."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norms = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()
    return v * (g / norms)
