"""Rows of weights by what they make in attention: queries, keys, values or the projection, told apart by one forward pass.

The position of queries, keys and values in a fused weight differs between networks: one after the other, or head by head. So
nothing is assumed of it. The pass records layers, softmaxes and products of activations. The score of query i and key j depends
on outputs of layers at these two tokens: what stays at token i while j changes are channels of queries, what moves with j are
channels of keys. Values are found in the same way from the derivative of the product after the softmax by the attention
weights, whose entry (i, j) is value j. Dependence is that of automatic differentiation, whose zeros are exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.linalg.curvature.attention_trace import AttentionTrace, LayerCall, ProductCall, SoftmaxCall

#: from a weight's or bias's name to the sorted numbers of its rows
Rows = dict[str, Tensor]
#: bits by which rows are labeled while the calls are gone through
_BITS = {"q": 1, "k": 2, "v": 4, "proj": 8}
#: the documented layout of PyTorch's own attention, beside the fused weights of queries, keys and values
_NAMED_PARTS = {
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
    "out_proj_weight": "proj",
    "out_proj_bias": "proj",
}
#: from entry ``(i, j)`` to where it depends on each layer's output, ``(tokens, channels)`` bool a layer
TokensOfEntry = Callable[[int, int], list[Tensor]]


@dataclass
class AttentionParts:
    """Rows of attention's parameters by part, and attention in which they are not certain.

    Attributes:
        rows: Rows by part (``q k v proj``) and name.
        unclear: Names of modules with attention whose rows are not certain, with the reason.
        layers: The calls of layers in the pass, in order.
    """

    rows: dict[str, Rows] = field(default_factory=lambda: {part: {} for part in ("q", "k", "v", "proj")})
    unclear: dict[str, str] = field(default_factory=dict)
    layers: list[LayerCall] = field(default_factory=list)


def attention_parts(model: nn.Module, inputs: Any) -> AttentionParts:
    """Return the rows of queries, keys, values and output projections in every attention of a model.

    Args:
        model: The model in eval mode, without a compiled part.
        inputs: ``(1, C, H, W)`` of the model's size, of which noise takes the place, or a batch of one example as the guarded
            model takes it, which is used as it is. They are moved to the device and floating-point type of the parameters.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(inputs.shape, generator=generator, dtype=torch.float32)
    is_images = isinstance(inputs, Tensor)
    inputs = inputs.to(like.device, like.dtype if not is_images or inputs.is_floating_point() else inputs.dtype)
    trace = AttentionTrace(model)
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in flags:
            if p.is_floating_point():
                p.requires_grad_(True)
        with torch.enable_grad(), trace.scopes_of_modules(), trace:
            model.forward(inputs) if is_images else model(inputs)  # hooks of the model itself belong to its user
        return _labeled(model, trace)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


@dataclass
class _RowLabels:
    """Parts of attention to which the rows of parameters belong, as far as the calls have been gone through.

    Attributes:
        bits: ``(rows,)`` by the name of a weight or bias: 0 of a row in no part, else the sum of its parts' bits.
        owners: The module with attention, by the same names.
        unclear: Names of modules with attention whose rows are not certain, with the reason.
    """

    bits: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)

    def mark(self, name: str, n_rows: int, part: str, owner: str, rows: Tensor | slice = slice(None)) -> None:
        """Label rows of a parameter with ``n_rows`` as those of a part, by default all."""
        bits = self.bits.setdefault(name, torch.zeros(n_rows, dtype=torch.int64))
        bits[rows] |= _BITS[part]
        self.owners[name] = owner


def _labeled(model: nn.Module, trace: AttentionTrace) -> AttentionParts:
    labels = _RowLabels()
    parts = AttentionParts(unclear=labels.unclear, layers=trace.layers)
    for scopes, arguments in trace.known:
        _label_known(trace, scopes[0], arguments, labels)
    products = {call.time: _product_after(trace, call) for call in trace.softmaxes}
    for call in trace.softmaxes:
        product = products[call.time]
        if product is not None:  # without one it is no attention, but the softmax of a gate
            _label_softmax(model, trace, call, product, labels)
    for product in _unexplained(trace, products):
        parts.unclear.setdefault(_attention_name(product), "it multiplies activations without a softmax")
    for name, bits in labels.bits.items():
        rows_of_parts = {part: bits == bit for part, bit in _BITS.items()}
        is_in_one_part = torch.stack(list(rows_of_parts.values())).any(0)
        if not bool(is_in_one_part.any()):  # a layer before several of them, such as a reduction of keys and values
            continue
        if not bool(is_in_one_part.all()):
            reason = f"some rows of {name} are none of queries, keys and values, or several of them"
            parts.unclear.setdefault(labels.owners[name], reason)
            continue
        for part, rows in rows_of_parts.items():
            if bool(rows.any()):
                parts.rows[part][name] = rows.nonzero()[:, 0]
    return parts


def _label_known(trace: AttentionTrace, owner: str, arguments: Mapping[str, Any], labels: _RowLabels) -> None:
    """Label the parameters of PyTorch's own attention, whose layout is documented: queries, then keys, then values."""
    for key, part in _NAMED_PARTS.items():
        name = trace.names.get(id(arguments.get(key)), "")
        if name:
            labels.mark(name, len(arguments[key]), part, owner)
    for key in ("in_proj_weight", "in_proj_bias"):
        name = trace.names.get(id(arguments.get(key)), "")
        if name:
            width = len(arguments[key]) // 3
            for number, part in enumerate("qkv"):
                labels.mark(name, 3 * width, part, owner, slice(number * width, (number + 1) * width))


def _unexplained(trace: AttentionTrace, products: Mapping[int, ProductCall | None]) -> Iterator[ProductCall]:
    """Yield the products of activations that neither make scores nor read the weights of a softmax, as in linear attention."""
    after = {product.time for product in products.values() if product is not None}
    for product in trace.products:
        if product.time in after or not product.is_of_activations or not product.output.requires_grad:
            continue
        following = next((call for call in trace.softmaxes if call.time > product.time), None)
        if following is None or not _depends(following.masked, product.output):
            yield product


def _label_softmax(
    model: nn.Module, trace: AttentionTrace, call: SoftmaxCall, product: ProductCall, labels: _RowLabels
) -> None:
    """Label the rows of the layers that make the queries, keys and values of a softmax and its product, and the layer behind."""
    owner = _attention_name(call)
    sources = _sources(trace, call, product)
    if sources is None:
        reason = "the scores' queries and keys, or the values, are not told apart"
        if call.scores.shape[call.axis] < 2:
            reason = "it has one key alone at this image size"
        labels.unclear[owner] = reason
        return
    scope, layers, channels = sources
    for part in "qkv":
        for layer, mask in zip(layers, channels[part]):
            if bool(mask.any()):
                labels.mark(layer.weight, len(mask), part, owner, mask)
    for layer, *masks in zip(layers, *(channels[part] for part in "qkv")):
        if any(bool(mask.any()) for mask in masks):
            _label_bias(model, trace, layer, masks, labels, scope)
    _label_projection(trace, call, product.output, labels)


def _sources(
    trace: AttentionTrace, call: SoftmaxCall, product: ProductCall
) -> tuple[str, list[LayerCall], dict[str, list[Tensor]]] | None:
    """Return the innermost scope whose layers make queries, keys and values, these layers, and their channels by ``q k v``.

    Two scopes with layers are tried, but not the whole model as the second one. None where they do not tell the three apart.
    """
    n_tried = 0
    for scope in call.scopes:
        layers = [
            layer for layer in trace.layers
            if layer.time < product.time and scope in layer.scopes and layer.output.requires_grad
        ]  # fmt: skip
        if not layers or n_tried == 2 or (n_tried and not scope):
            continue
        n_tried += 1
        channels = _channels(call, product.output, layers)
        if all(any(bool(mask.any()) for mask in channels[part]) for part in "qkv"):
            return scope, layers, channels
    return None


def _attention_name(call: SoftmaxCall | ProductCall) -> str:
    """Return the innermost module around a softmax or product that is no softmax itself."""
    names = [scope for scope in call.scopes if not scope.rpartition(".")[2].startswith("softmax")]
    return (names[0] if names else "") or "the model"


def _product_after(trace: AttentionTrace, call: SoftmaxCall) -> ProductCall | None:
    """Return the first product of activations after a softmax that depends on its weights."""
    for product in trace.products:
        if product.time > call.time and _depends(product.output, call.weights):
            return product
    return None


def _depends(output: Tensor, source: Tensor) -> bool:
    if not (output.requires_grad and source.requires_grad):
        return False
    return torch.autograd.grad(output.sum(), source, retain_graph=True, allow_unused=True)[0] is not None


def _channels(call: SoftmaxCall, output: Tensor, layers: Sequence[LayerCall]) -> dict[str, list[Tensor]]:
    """Return for ``q``, ``k`` and ``v`` which channels of each layer's output they are, ``(rows,)`` bool a layer."""
    weighting = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).to(output) + 0.5
    (by_weights,) = torch.autograd.grad((output * weighting).sum(), call.weights, create_graph=True)
    scores, values = _split(call, call.scores, layers), _split(call, by_weights, layers)
    return {"q": scores.of_query, "k": scores.of_key, "v": values.of_key}


@dataclass
class _ChannelsOfPairs:
    """Channels of each layer's output that follow the query, and those that follow the key, ``(rows,)`` bool a layer."""

    of_query: list[Tensor]
    of_key: list[Tensor]

    def label(self, tokens: TokensOfEntry, i: int, other_i: int, j: int, other_j: int) -> bool:
        """Label channels by entries ``(i, j), (i, other_j), (other_i, j)``; return whether there were new ones.

        Channels of the query stay at their tokens when j changes, and leave them all when i changes; those of the key likewise
        with i and j exchanged.
        """
        before = self._n_labels()
        for layer, (entry, other_key) in enumerate(zip(tokens(i, j), tokens(i, other_j))):
            is_of_query = (entry == other_key).all(0)
            is_of_key = ~(entry & other_key).any(0)
            if i != other_i:
                other_query = tokens(other_i, j)[layer]
                is_of_query = is_of_query & ~(entry & other_query).any(0)
                is_of_key = is_of_key & (entry == other_query).all(0)
            is_used = entry.any(0)
            self.of_query[layer] |= is_used & is_of_query
            self.of_key[layer] |= is_used & is_of_key
        return self._n_labels() > before

    def _n_labels(self) -> int:
        return sum(int(mask.sum()) for mask in (*self.of_query, *self.of_key))


def _split(call: SoftmaxCall, pairs: Tensor, layers: Sequence[LayerCall]) -> _ChannelsOfPairs:
    """Return the channels of layers that follow query i or key j of entries ``(..., i, j)``."""
    key_axis = call.axis
    query_axis = max(axis for axis in range(pairs.ndim) if axis != key_axis)
    n_queries, n_keys = pairs.shape[query_axis], pairs.shape[key_axis]
    none = [torch.zeros(layer.output.shape[layer.channels], dtype=torch.bool) for layer in layers]
    channels = _ChannelsOfPairs(none, [mask.clone() for mask in none])
    if n_keys < 2 or not pairs.requires_grad:
        return channels
    weighted = pairs * (torch.rand(pairs.shape, generator=torch.Generator().manual_seed(2)).to(pairs) + 0.5)

    @functools.lru_cache(maxsize=64)
    def tokens(i: int, j: int) -> list[Tensor]:
        entry: list[int | slice] = [slice(None)] * pairs.ndim
        entry[query_axis], entry[key_axis] = i, j
        return _supports(weighted[tuple(entry)].sum(), layers)

    key_places = dict.fromkeys([(n_keys // 4, 3 * n_keys // 4), *_places(n_keys)])  # also others than the queries'
    for (i, other_i), (j, other_j) in itertools.product(_places(n_queries), key_places):
        if j != other_j:
            channels.label(tokens, i, other_i, j, other_j)
    if n_queries == n_keys > 3:
        _label_channel_attention(channels, tokens, n_keys)
    return channels


def _label_channel_attention(channels: _ChannelsOfPairs, tokens: TokensOfEntry, n: int) -> None:
    """Label channels by further entries until two of them show nothing new.

    In attention over channels each entry depends on one channel of a head alone.
    """
    n_without_new = 0
    for i in range(n):
        other = (i + 2) % n
        has_new = channels.label(tokens, i, other, (i + 1) % n, other)
        n_without_new = 0 if has_new else n_without_new + 1
        if n_without_new == 2:
            return


def _places(n: int) -> list[tuple[int, int]]:
    """Return pairs of tokens out of ``n``, far apart; one token twice where there is one alone."""
    first, middle, last = 0, n // 2, n - 1
    return list(dict.fromkeys([(first, last), (middle, first), (last, middle)])) if n > 2 else [(0, n - 1)]


def _supports(value: Tensor, layers: Sequence[LayerCall]) -> list[Tensor]:
    """Return ``(tokens, channels)`` a layer: where the derivative of a number by the layer's output is not zero."""
    gradients = torch.autograd.grad(value, [layer.output for layer in layers], retain_graph=True, allow_unused=True)
    supports = []
    for layer, gradient in zip(layers, gradients):
        gradient = torch.zeros_like(layer.output) if gradient is None else gradient
        supports.append((gradient.movedim(layer.channels, -1).flatten(0, -2) != 0).cpu())  # (..., channels) to 2 axes
    return supports


def _label_bias(
    model: nn.Module, trace: AttentionTrace, layer: LayerCall, masks: Sequence[Tensor], labels: _RowLabels, scope: str
) -> None:
    """Label a bias like the rows of its weight; of one that is put together from parameters, each of these."""
    if layer.bias is None:
        return
    owner = labels.owners[layer.weight]
    name = trace.names.get(id(layer.bias))
    if name is not None:
        for part, mask in zip("qkv", masks):
            if bool(mask.any()):
                labels.mark(name, len(mask), part, owner, mask)
        return
    if not layer.bias.requires_grad:
        return
    prefix = f"{scope}." if scope else ""
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1 and name.startswith(prefix)}
    for part, mask in zip("qkv", masks):
        if not bool(mask.any()):
            continue
        bias_sum = layer.bias[mask.to(layer.bias.device)].sum()
        for name, vector in vectors.items():
            gradient = torch.autograd.grad(bias_sum, vector, retain_graph=True, allow_unused=True)[0]
            rows = None if gradient is None else (gradient != 0).cpu()
            if rows is not None and bool(rows.any()):
                labels.mark(name, len(rows), part, owner, rows)


def _label_projection(trace: AttentionTrace, call: SoftmaxCall, output: Tensor, labels: _RowLabels) -> None:
    """Label the first layer after attention's product that reads it."""
    owner = _attention_name(call)
    for layer in trace.layers:
        if layer.time > call.time and layer.input.requires_grad and _depends(layer.input, output):
            labels.mark(layer.weight, layer.output.shape[layer.channels], "proj", owner)
            if layer.bias is not None and id(layer.bias) in trace.names:
                labels.mark(trace.names[id(layer.bias)], len(layer.bias), "proj", owner)
            return
