"""Attention weights of every attention module, read in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitscope.models import timm_internals
from vitscope.models.structure.residual_units import Unit


@contextmanager
def reading_attention(units: Sequence[Unit], fn: Callable[[int, Unit, Tensor], None]) -> Iterator[None]:
    """Call ``fn(index, unit, weights)`` with the attention weights of each unit that has an attention module.

    ``weights`` are (n, heads, queries, keys), rows sum to 1; n is the batch, or batch * windows where
    ``unit.window`` is not None. Queries and keys start with ``unit.n_prefix`` prefix tokens where attention is
    global. They are computed eagerly, in float32 at least, from the arguments of
    ``scaled_dot_product_attention``; the model's output does not change beyond rounding. Attention that
    does not call that function (Swin V2's cosine attention, torchvision's) is passed over in silence.
    """
    current: list[tuple[int, Unit]] = []
    with ExitStack() as stack:
        for i, unit in enumerate(units):
            if unit.attention is None:
                continue
            # timm's explicit path never calls the function below
            stack.enter_context(timm_internals.fused_attention(unit.attention))
            enter = unit.attention.register_forward_pre_hook(lambda *_, i=i, unit=unit: current.append((i, unit)))
            leave = unit.attention.register_forward_hook(lambda *_: (current.pop(), None)[1])
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(_Weights(lambda weights: fn(*current[-1], weights) if current else None))
        yield


class _Weights(TorchFunctionMode):
    """Compute the weights of every scaled_dot_product_attention and hand them on."""

    def __init__(self, fn: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.fn = fn

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.fn(attention_weights(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k' * scale + mask), the weights of ``scaled_dot_product_attention`` with these arguments.

    Raises:
        ValueError: For causal or grouped attention, which no vision model here uses.
    """
    if is_causal or enable_gqa:
        raise ValueError("attention weights are read for full, ungrouped attention only.")
    q, k = (t if t.element_size() >= 4 else t.float() for t in (query, key))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
    return scores.softmax(-1)
