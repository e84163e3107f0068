"""Channels of an attention head in the input of the output projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.runtime.errors import StructureError

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

    def channels_of(self, head: int, n_heads: int, x: Tensor, axis: int, attention: nn.Module, name: str) -> Tensor:
        """Return the numbers of a head's channels in the input of the unit's projection.

        Args:
            head: Number of the head.
            n_heads: Number of heads.
            x: The input of the projection.
            axis: The axis of channels.
            attention: The attention module.
            name: Name of the unit, for errors.

        Raises:
            ValueError: Heads that do not divide the channels.
            StructureError: Attention of an unknown package whose heads the input does not hold one after the other or in turn.
        """
        n_channels = x.shape[axis]
        if n_channels % n_heads:
            raise ValueError(
                f"Expected channels of {n_heads} heads before the projection of {name!r}, received {n_channels}."
            )
        numbers = torch.arange(n_channels, device=x.device)
        one_after_the_other, in_turn = numbers.view(n_heads, -1), numbers.view(-1, n_heads).mT
        tokens = x.movedim(axis, -1).flatten(1, -2)  # (B, N, C)
        out = self.output  # (B, heads, N, C / heads)
        if out is not None and out.ndim == 4 and out.shape[1] == n_heads:
            if _are_equal(tokens, out.transpose(1, 2).flatten(2)):
                return one_after_the_other[head]
            if _are_equal(tokens, out.permute(0, 2, 3, 1).flatten(2)):
                return in_turn[head]
        if type(attention).__module__.partition(".")[0] in _PACKAGES:
            return one_after_the_other[head]
        raise StructureError(
            name,
            "the pass does not show which channels of its projection belong to a head",
            "leave 'head' out of the removals",
        )


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
