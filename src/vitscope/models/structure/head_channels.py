"""Channels of an attention head in the input of the output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitscope.runtime.errors import StructureError

if TYPE_CHECKING:
    from vitscope.models.structure.residual_units import Unit

#: packages whose attention hands one head after the other to its projection, also behind a norm or a gate
_PACKAGES = ("timm", "torchvision", "transformers", "vitscope")


class HeadOutputs(TorchFunctionMode):
    """Note what each call of ``scaled_dot_product_attention`` returns, until the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.output = result
        return result

    def channels_of(self, head: int, x: Tensor, axis: int, unit: Unit) -> Tensor:
        """Return the numbers of a head's channels in the input of the unit's projection.

        Args:
            head: Number of the head.
            x: The input of the projection.
            axis: Its axis of channels.
            unit: The unit, whose heads are ``unit.n_heads``.

        Raises:
            ValueError: Heads that do not divide the channels.
            StructureError: Attention of an unknown package whose heads the input does not hold one after the other or in turn.
        """
        n_channels = x.shape[axis]
        if n_channels % unit.n_heads:
            raise ValueError(
                f"Expected channels of {unit.n_heads} heads before the projection of {unit.name!r}, received {n_channels}."
            )
        numbers = torch.arange(n_channels, device=x.device)
        one_after_the_other, in_turn = numbers.view(unit.n_heads, -1), numbers.view(-1, unit.n_heads).mT
        tokens = x.movedim(axis, -1).flatten(1, -2)  # (B, N, C)
        out = self.output  # (B, heads, N, C / heads)
        if out is not None and out.ndim == 4 and out.shape[1] == unit.n_heads:
            if _are_equal(tokens, out.transpose(1, 2).flatten(2)):
                return one_after_the_other[head]
            if _are_equal(tokens, out.permute(0, 2, 3, 1).flatten(2)):
                return in_turn[head]
        if type(unit.attention).__module__.partition(".")[0] in _PACKAGES:
            return one_after_the_other[head]
        raise StructureError(
            unit.name,
            "the pass does not show which channels of its projection belong to a head",
            "leave 'head' out of the removals",
        )


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
