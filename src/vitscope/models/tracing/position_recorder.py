"""Follow the positions of each value of a forward pass, function by function."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.models.structure.execution import function_name, tensors
from vitscope.models.tracing.positions import (
    CONSTANT,
    Positions,
    compact,
    expanded,
    is_constant,
    map_positions,
    result_positions,
)

#: functions whose results have the shape of their argument and none of its values
_NEW = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")


class PositionRecorder(TorchFunctionMode):
    """Follow the positions of each value while it is entered.

    Args:
        images: (B, C, H, W) that the model is given.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.size = (int(images.shape[-2]), int(images.shape[-1]))
        # entries end with their tensors: all activations of a large network would not fit into memory
        self.positions: MutableMapping[Tensor, Positions | None] = WeakIdKeyDictionary()
        self.positions[images] = expanded(map_positions(len(images), *self.size), images.shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = function_name(func)
        results = [args[0]] if name == "__setitem__" else list(tensors(result))
        if not results:
            return result
        arguments = list(tensors((args, tuple(kwargs.values()))))
        if name.startswith(_NEW) or not any(self.varies(t) for t in arguments):
            positions: list[Positions | None] = [constant_positions(t) for t in results]
        else:
            positions = result_positions(name, func, args, kwargs, self.positions_of, results)
        for tensor, values in zip(results, positions):
            self.positions[tensor] = None if values is None else compact(values)
        base = getattr(results[0], "_base", None)
        if name in ("copy_", "__setitem__") and base is not None and base is not results[0]:
            self.positions[base] = None
        return result

    def positions_of(self, tensor: Tensor) -> Positions | None:
        """Return the positions of a tensor; one that no function of the pass made is a constant if it has no gradient."""
        if tensor in self.positions:
            return self.positions[tensor]
        return None if tensor.grad_fn is not None else constant_positions(tensor)

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the images, as far as is known."""
        positions = self.positions_of(tensor)
        return positions is None or not is_constant(positions)


def constant_positions(tensor: Tensor) -> Positions:
    """Return the positions of a tensor that does not depend on the images."""
    values = torch.full((), CONSTANT, dtype=torch.float64).expand(tensor.shape)
    return Positions(values, values)
