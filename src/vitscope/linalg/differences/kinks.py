"""Functions with a kink that a network calls: their gradients jump, which differences over a step count as curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: names of functions of torch whose derivative jumps, without the underscore of those that work in place
KINKED = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "hardshrink",
    "softshrink", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d",
})  # fmt: skip


class _Recorder(TorchFunctionMode):
    """Records the names of functions with a kink that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and record it."""
        name = getattr(func, "__name__", "").removesuffix("_")
        if name in KINKED:
            self.names[name] = None
        return func(*args, **(kwargs or {}))


def kinked_functions(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    """Return the names of the functions with a kink that a forward pass calls, in their order.

    Args:
        model: the model, inside a guard.
        inputs: inputs of the model.
    """
    with torch.no_grad(), _Recorder() as recorder:
        model(inputs)
    return tuple(recorder.names)
