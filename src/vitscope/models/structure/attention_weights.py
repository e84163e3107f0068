"""Attention weights of every attention module, read in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.models.structure.feature_maps import is_outside_of_pass
from vitscope.models.structure.residual_units import Unit

#: functions that multiply weights with values
PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"})
#: functions that leave a softmax as it is, but for its shape and type
_SAME_WEIGHTS = frozenset({
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double", "view", "reshape", "flatten", "unflatten",
    "contiguous", "expand", "squeeze", "unsqueeze", "clone", "transpose", "permute", "swapaxes", "movedim", "view_as",
    "reshape_as", "mT",
})  # fmt: skip

#: largest deviation from one of a sum of weights, in units of the rounding of their type; each weight adds its share of one unit
_MEAN_ERROR = 32
_NO_MEAN = "the softmax runs over other positions than those whose values are summed"

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class AttentionCall:
    """Attention in a forward pass, found as one call or as a softmax that is multiplied with values.

    Attributes:
        weights: Function that computes the weights (..., queries, keys), in float32 at least; rows sum to 1.
        query: (..., queries, channels) of one call; None for a softmax.
        key: (..., keys, channels) likewise.
        softmax: (..., queries, keys) the softmax; None for one call.
        source: The tensor of the weights from which the output is computed, to differentiate by it; of one call only where that
            is asked for.
        is_transposed: Whether the source is (..., keys, queries).
        refusal: Why the weights cannot be read; empty where they can.
    """

    weights: Callable[[], Tensor]
    query: Tensor | None = None
    key: Tensor | None = None
    softmax: Tensor | None = None
    source: Tensor | None = None
    is_transposed: bool = False
    refusal: str = ""


@contextmanager
def reading_attention(units: Sequence[Unit], fn: Callable[[int, Unit, Tensor], None]) -> Iterator[None]:
    """Call ``fn(index, unit, weights)`` with the attention weights of each unit that has an attention module.

    ``weights`` are (n, heads, queries, keys), rows sum to 1; n is the batch, or batch * windows where
    ``unit.window`` is not None. Queries and keys start with ``unit.n_prefix`` prefix tokens where attention is
    global. They are those of `AttentionMode`, and the model's output does not change. Attention that is neither
    one call nor a softmax over four axes is passed over in silence; `attention_units` finds it for more layouts.
    """

    def read(index_and_unit: tuple[int, Unit], call: AttentionCall) -> None:
        weights = call.weights()
        if weights.ndim == 4:
            fn(*index_and_unit, weights)

    owners = {unit.attention: (i, unit) for i, unit in enumerate(units) if unit.attention is not None}
    with reading_calls(owners, read):
        yield


@contextmanager
def reading_calls(
    owners: Mapping[nn.Module, Owner], fn: Callable[[Owner, AttentionCall], None], explicit: bool = False
) -> Iterator[None]:
    """Call ``fn(owner, call)`` for each attention inside of a module; of nested modules the innermost counts.

    Args:
        owners: What each module's attention belongs to.
        fn: Function that takes the owner and the attention.
        explicit: Whether the output is computed from the weights, so that it can be differentiated by them.
    """
    running: list[Owner] = []

    def end(*_: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module, owner in owners.items():
            enter = module.register_forward_pre_hook(lambda *_, owner=owner: running.append(owner))
            leave = module.register_forward_hook(end)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(AttentionMode(lambda call: fn(running[-1], call) if running else None, explicit))
        yield


class AttentionMode(TorchFunctionMode):
    """Notice each attention of a forward pass.

    Attention is ``scaled_dot_product_attention``, ``multi_head_attention_forward``, or a softmax over one of the last two axes
    that is multiplied with a tensor that is no parameter. A softmax whose heads are mixed before the product is not noticed: its
    weights are others. The output of the model does not change, unless it is to be computed from the weights.

    Args:
        fn: Function that takes each attention.
        explicit: Whether the output of attention as one call is computed from its weights.
    """

    def __init__(self, fn: Callable[[AttentionCall], None], explicit: bool = False) -> None:
        super().__init__()
        self.fn, self.explicit = fn, explicit
        # by tensor: the softmax that it is, as far as no product has used it; None for the tensor itself
        self.softmax_of: MutableMapping[Tensor, Tensor | None] = WeakIdKeyDictionary()
        self.used: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()
        self.over_queries: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # (..., keys, queries)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_outside_of_pass():
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._one_call(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            self._product(name, args, kwargs)
        result = func(*args, **kwargs)
        if name == "softmax" and isinstance(result, Tensor) and result.ndim > 1:
            dimension = _dimension(args, kwargs)
            if isinstance(dimension, int) and dimension % result.ndim >= result.ndim - 2:
                self.softmax_of[result] = None
                self.over_queries[result] = dimension % result.ndim == result.ndim - 2
        elif name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _SAME_WEIGHTS and isinstance(result, Tensor) and args and args[0] in self.softmax_of:
            self.softmax_of.setdefault(result, self._softmax(args[0]))  # which may be the argument itself
        return result

    def _softmax(self, tensor: Tensor) -> Tensor:
        source = self.softmax_of[tensor]
        return tensor if source is None else source

    def _product(self, name: str, args: Any, kwargs: Any) -> None:
        operands = _operands(args, kwargs)
        position = next((i for i, operand in enumerate(operands) if operand in self.softmax_of), None)
        if position is None:
            return
        weights = self._softmax(operands[position])
        if weights in self.used or any(_mixes_heads(operand, weights) for operand in operands):
            return
        self.used[weights] = True
        is_transposed = self.over_queries[weights]
        oriented = weights.transpose(-2, -1) if is_transposed else weights  # (..., queries, keys)
        axes = _summed_axes(name, args, position, operands[position].ndim)
        call = AttentionCall(
            lambda: _at_least_single(oriented), softmax=oriented, source=weights, is_transposed=is_transposed
        )
        if not _sums_to_one(operands[position], axes, weights.dtype):
            call = replace(call, weights=_unread_means, refusal=_NO_MEAN)
        self.fn(call)

    def _one_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        options = _sdpa_arguments(*args, **kwargs)
        query, key, value = options["query"], options["key"], options["value"]
        refusal = _refusal(options)
        if not self.explicit or refusal:
            self.fn(AttentionCall(lambda: attention_weights(**options), query, key, refusal=refusal))
            return func(*args, **kwargs)
        weights = attention_weights(**options)
        self.fn(AttentionCall(lambda: weights, query, key, source=weights))
        return weights.to(value.dtype) @ value

    def _multi_head(self, func: Any, args: Any, kwargs: Any) -> Any:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if _is_unusual(arguments):
            refusal = "its attention has additional keys or masks"
            self.fn(AttentionCall(_unread, arguments["query"], arguments["key"], refusal=refusal))
            return func(*args, **kwargs)
        query, key, value = _heads(arguments)
        if not self.explicit:
            self.fn(AttentionCall(lambda: attention_weights(query, key, value), query, key))
            return func(*args, **kwargs)
        weights = attention_weights(query, key, value)
        self.fn(AttentionCall(lambda: weights, query, key, source=weights))
        out = (weights.to(value.dtype) @ value).permute(2, 0, 1, 3).flatten(2)  # (B, heads, L, d) to (L, B, heads * d)
        returned = None
        if arguments["need_weights"]:
            returned = weights.mean(1) if arguments["average_attn_weights"] else weights
        return F.linear(out, arguments["out_proj_weight"], arguments["out_proj_bias"]), returned


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
    q, k = (_at_least_single(t) for t in (query, key))
    # scaled before the product, since the scores are many more than the queries
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
    return scores.softmax(-1)


#: `attention_weights` takes the arguments of ``scaled_dot_product_attention`` in its order
_SDPA_SIGNATURE = inspect.signature(attention_weights)


def _operands(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a product multiplies, which stand behind the equation of an einsum or in one sequence."""
    operands = args[1:] if args and isinstance(args[0], str) else args
    if operands and isinstance(operands[0], tuple | list):
        operands = operands[0]
    return [operand for operand in (*operands, *kwargs.values()) if isinstance(operand, Tensor)]


def _is_unusual(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a call of ``multi_head_attention_forward`` has no batch, additional keys or masks."""
    unusual = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    if arguments["query"].ndim != 3 or arguments["add_zero_attn"]:
        return True
    return any(arguments[name] is not None for name in unusual)


def _mixes_heads(operand: Tensor, weights: Tensor) -> bool:
    """Tell whether an operand is no values: a parameter, or a matrix that is the same for all images and heads."""
    return isinstance(operand, nn.Parameter) or operand.ndim <= 2 < weights.ndim


def _at_least_single(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()


def _dimension(args: Any, kwargs: Any) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("dim")


def _sdpa_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of ``scaled_dot_product_attention`` by name, with the defaults of `attention_weights`."""
    call = _SDPA_SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def _refusal(options: Mapping[str, Any]) -> str:
    if options["is_causal"]:
        return "its attention is causal"
    return "its attention is grouped" if options["enable_gqa"] else ""


def _summed_axes(name: str, args: Any, position: int, n_axes: int) -> list[int]:
    """Return the axes of one of two operands over which a product sums; none where its equation does not say."""
    if name != "einsum":
        swapped = name == "__rmatmul__"
        return [n_axes - 1 if (position == 0) != swapped else n_axes - 2]
    inputs, _, output = args[0].replace(" ", "").partition("->") if isinstance(args[0], str) else ("", "", "")
    labels = inputs.split(",")[position] if inputs.count(",") >= position else ""
    return [axis for axis, label in enumerate(labels) if label not in output] if len(labels) == n_axes else []


def _sums_to_one(weights: Tensor, axes: Sequence[int], softmax_dtype: torch.dtype) -> bool:
    """Whether the weights of the first image sum to one over the axes of a product, so that the product is a mean of values.

    Args:
        weights: An operand of the product.
        axes: The axes that the product sums over.
        softmax_dtype: Type that the softmax was rounded to, which may be coarser or finer than that of the operand.
    """
    if not axes or weights.is_meta or weights.ndim < 3:
        return True
    rows = (weights[:1] if 0 not in axes else weights).detach()
    sums = rows.sum(dim=list(axes), dtype=torch.float64)
    eps = max(torch.finfo(dtype).eps for dtype in (weights.dtype, softmax_dtype))
    return bool(((sums - 1).abs() <= _MEAN_ERROR * eps).logical_or(sums.isnan()).all())


def _unread_means() -> Tensor:
    raise ValueError(f"Expected attention whose output is a mean of values, received one of which {_NO_MEAN}.")


def _unread() -> Tensor:
    raise ValueError("Expected attention without additional keys or masks, received others.")


def _heads(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (B, heads, L, d) of ``multi_head_attention_forward``, whose inputs are (L, B, C)."""
    if arguments["use_separate_proj_weight"]:
        layers = [arguments[f"{name}_proj_weight"] for name in "qkv"]
    else:
        layers = arguments["in_proj_weight"].chunk(3)
    biases = [None] * 3 if arguments["in_proj_bias"] is None else arguments["in_proj_bias"].chunk(3)
    inputs = (arguments["query"], arguments["key"], arguments["value"])
    projected = [F.linear(x, layer, bias) for x, layer, bias in zip(inputs, layers, biases)]  # (L, B, heads * d)
    query, key, value = (x.unflatten(2, (arguments["num_heads"], -1)).permute(1, 2, 0, 3) for x in projected)
    return query, key, value
