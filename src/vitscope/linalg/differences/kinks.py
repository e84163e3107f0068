"""Functions with a kink that a network calls: their gradients jump, which differences over a step count as curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: names of functions of torch whose derivative jumps, without the underscore of those that work in place; comparisons and the
#: numbers of largest entries, which choose between values
KINKED = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "hardshrink",
    "softshrink", "selu", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d", "abs", "absolute", "__abs__",
    "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "fmax", "fmin", "max", "min", "amax", "amin", "topk", "sort",
    "median", "nanmedian", "kthvalue", "aminmax", "cummax", "cummin", "argmax", "argmin", "argsort", "sign", "sgn", "heaviside",
    "gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal",
})  # fmt: skip


class _Recorder(TorchFunctionMode):
    """Records the names of functions with a kink that are called with values which depend on the weights.

    A function of a parameter itself, such as Swin V2's bound of a temperature, has its one kink far from the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and record it."""
        own_name = getattr(func, "__name__", "")
        name = own_name if own_name.endswith("__") else own_name.removesuffix("_")
        has_kink = name in KINKED or (name == "elu" and (kwargs or {}).get("alpha", 1.0) != 1.0)
        if has_kink and any(_depends_on_weights(value) for value in (*args, *(kwargs or {}).values())):
            self.names[name.strip("_")] = None
        return func(*args, **(kwargs or {}))


def _depends_on_weights(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def kinked_functions(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    """Return the names of the functions with a kink that a forward pass calls, in their order.

    Args:
        model: The model, inside a guard, the analyzed weights with ``requires_grad``.
        inputs: Inputs of the model.
    """
    with torch.enable_grad(), _Recorder() as recorder:
        model(inputs)
    return tuple(recorder.names)
