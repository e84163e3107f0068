"""Record the layers, softmaxes and products of activations of one forward pass, with the modules that were running."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"})


@dataclass
class LayerCall:
    """One call of a linear layer or convolution.

    Attributes:
        time: Number of the call among all that were recorded.
        scopes: Names of the modules that were running, the innermost first.
        weight: Name of the weight.
        bias: The bias, a parameter or made from some; None without one.
        input: Input of the layer.
        output: Output of the layer.
        channels: Axis of the output along which the rows of the weight lie.
    """

    time: int
    scopes: tuple[str, ...]
    weight: str
    bias: Tensor | None
    input: Tensor
    output: Tensor
    channels: int


@dataclass
class SoftmaxCall:
    """One softmax over keys.

    Attributes:
        time: Number of the call among all that were recorded.
        scopes: Names of the modules that were running, the innermost first.
        scores: ``(..., queries, keys)``, without a mask where it is one call of attention.
        masked: The scores of which the softmax is taken.
        axis: Axis of the keys.
        weights: Weights of the same shape.
    """

    time: int
    scopes: tuple[str, ...]
    scores: Tensor
    masked: Tensor
    axis: int
    weights: Tensor


@dataclass
class ProductCall:
    """One product of two tensors, neither of which is a parameter where ``is_of_activations``."""

    time: int
    scopes: tuple[str, ...]
    output: Tensor
    is_of_activations: bool


class AttentionTrace(TorchFunctionMode):
    """Records layers, softmaxes and products of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.layers: list[LayerCall] = []
        self.softmaxes: list[SoftmaxCall] = []
        self.products: list[ProductCall] = []
        self.known: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.stack: list[str] = [""]
        self.time = 0

    @contextmanager
    def scopes_of_modules(self) -> Iterator[None]:
        """Keep the stack of running modules by hooks."""
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                if name:
                    enter = module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name))
                    leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
                    hooks.callback(enter.remove)
                    hooks.callback(leave.remove)
            yield

    def _leave(self) -> None:
        self.stack.pop()

    @property
    def scopes(self) -> tuple[str, ...]:
        """Names of the running modules, the innermost first."""
        return tuple(reversed(self.stack))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and record it."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        self.time += 1
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs)
            self.known.append((self.scopes, dict(bound.arguments)))
        result = func(*args, **kwargs)
        if name in _LAYERS:
            self._layer(name, result, *args, **kwargs)
        elif name == "softmax" and isinstance(result, Tensor):
            self._softmax(result, *args, **kwargs)
        elif name in _PRODUCTS and isinstance(result, Tensor):
            is_of_activations = not any(isinstance(value, nn.Parameter) for value in (*args, *kwargs.values()))
            self.products.append(ProductCall(self.time, self.scopes, result, is_of_activations))
        return result

    def _layer(
        self, kind: str, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
    ) -> None:
        if id(weight) in self.names:
            channels = output.ndim - 1 if kind == "linear" else output.ndim - weight.ndim + 1
            name = self.names[id(weight)]
            self.layers.append(LayerCall(self.time, self.scopes, name, bias, input, output, channels))

    def _softmax(self, weights: Tensor, scores: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        if dim is not None and scores.ndim > 2:
            self.softmaxes.append(SoftmaxCall(self.time, self.scopes, scores, scores, dim % scores.ndim, weights))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return `F.scaled_dot_product_attention` in eval mode, its scores recorded without the mask."""
        if enable_gqa:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        masked = scores
        if is_causal:
            masked = masked.masked_fill(
                ~torch.ones_like(scores[0, 0] if scores.ndim > 3 else scores[0]).bool().tril(), float("-inf")
            )
        if attn_mask is not None:
            masked = (
                masked.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else masked + attn_mask
            )
        weights = masked.softmax(-1)
        self.softmaxes.append(SoftmaxCall(self.time, self.scopes, scores, masked, scores.ndim - 1, weights))
        self.time += 1
        output = weights @ value
        self.products.append(ProductCall(self.time, self.scopes, output, True))
        return output
