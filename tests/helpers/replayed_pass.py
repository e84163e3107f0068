"""Forward passes in which one residual addition is watched, or returns its stream alone, at the level of functions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.models.tracing.recorder import _Recorder


class ReplayedPass(_Recorder):
    """Count the functions of a pass as the trace does and treat the additions at given places.

    Args:
        model: The model.
        images: The images of the pass.
        places: Indices of additions in the trace.
        change: Receives the place, the operands and the sum; returns the tensor to go on with.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        places: Collection[int],
        change: Callable[[int, list[Tensor], Tensor], Tensor],
    ) -> None:
        super().__init__(model, images)
        self.places, self.change = set(places), change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = len(self.trace.nodes)
        if place not in self.places:
            return super().__torch_function__(func, types, args, kwargs)
        operands = [t.clone() if isinstance(t, Tensor) else t for t in args[:2]]
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.trace.nodes) > place:
            changed = self.change(place, operands, result)
            if changed is not result:
                result.copy_(changed)
        return result


def replayed(
    model: nn.Module, images: Tensor, places: Collection[int], change: Callable[[int, list[Tensor], Tensor], Tensor]
) -> Tensor:
    """Run the model once with the additions at ``places`` treated by ``change``, and return its output."""
    recorder = ReplayedPass(model, images, places, change)
    with torch.no_grad(), recorder.hooks(), recorder:
        output = model.forward(images)
    assert isinstance(output, Tensor)
    return output
