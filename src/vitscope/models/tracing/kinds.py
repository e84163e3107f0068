"""Kind of a part of the network from the functions that it runs.

The rules, in this order:

1. ``msa``: attention, as one call or as a product of activations with a softmax (or another product) of activations, also
   across channels or without a softmax. In a part without a spatial kernel also attention of one query (a class token), and
   a sum over positions that weighs them by activations (separable and additive attention).
2. ``conv``: a kernel that covers more than one position, a Fourier filter.
3. ``mlp``: linear layers, 1x1 convolutions and recurrent layers, across channels or across tokens; 1x1 convolutions without a
   nonlinearity are ``conv``.
4. ``pool``: pooling or shifting without weights.

A branch that expands channels, applies a depthwise kernel and projects back is ``conv``, as in MobileNets. Directly behind an
attention or pooling unit of the same block it is that block's feed-forward layer and ``mlp``, as in PVT v2 and SegFormer.

A softmax that weighs values of one position, as of experts, makes no attention, unless the branch has moved these values there
from other positions. A layer on patches (``unfold``) is a kernel. `doubt_about` names what these rules do not cover.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import NamedTuple

from vitscope.core.tap import Kind
from vitscope.models.structure.residual_structure import gates_channels
from vitscope.models.tracing.additions import ACTIVATIONS, ADDITIONS, is_nonlinear, is_norm
from vitscope.models.tracing.graph import Node, Trace

_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__"})
_MATRIX_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "mm"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_FOURIER = ("fft", "rfft", "ifft", "irfft")
#: functions that show patches of a map to a layer, as a kernel does
_PATCHES = frozenset({"unfold", "im2col"})
#: functions that bring values of other positions to a position
_MOVES = _PATCHES | {
    "roll", "pad", "gather", "take_along_dim", "index_select", "flip", "grid_sample", "cumsum", "cumprod", "logcumsumexp",
}  # fmt: skip


def kind_of(trace: Trace, region: Collection[int]) -> Kind | None:
    """Return the kind of the nodes of a branch or module; None where they mix neither positions nor channels."""
    nodes = [trace.nodes[i] for i in sorted(region) if not in_gate(trace, trace.nodes[i])]
    has_kernel = any(is_spatial(trace, node) or node.op.startswith(_FOURIER) for node in nodes)
    # attention of several queries; in a part without a kernel, also that of one query and sums over positions
    if any(is_attention(node) or _weighs_moved(trace, node, region) for node in nodes):
        return "msa"
    if not has_kernel and any(node.attention or weighs_positions(trace, node) for node in nodes):
        return "msa"
    varying = [node for node in nodes if node.varying]
    if has_kernel or any(node.op in _PATCHES for node in varying):
        return "conv"
    mixers = [node for node in varying if _is_layer(node) or node.op in _RECURRENT]
    if mixers:
        is_linear = not any(is_nonlinear(trace, node.index) for node in nodes)
        return "conv" if is_linear and all(node.op.startswith("conv") for node in mixers) else "mlp"
    if any("pool" in node.op and node.shape[-2:] != (1, 1) for node in varying):
        return "pool"
    return "pool" if any(node.op == "roll" for node in nodes) else None


def doubt_about(trace: Trace, region: Collection[int]) -> str | None:
    """Return why the kind of a branch that shows no attention is not certain; None where it is."""
    nodes = [trace.nodes[i] for i in sorted(region) if not in_gate(trace, trace.nodes[i])]
    if any(node.opaque and node.varying for node in nodes):
        return "runs a function that the forward pass does not show (an operator of an extension, torch.func, a compiled part)"
    gates = [node.index for node in nodes if node.attention]  # of one query, as in a gate of positions
    if any(node.unweighed_product and not any(trace.is_ancestor(node.index, i) for i in gates) for node in nodes):
        return "multiplies activations by activations in a way that is not known"
    has_kernel = any(is_spatial(trace, node) for node in nodes)
    if not has_kernel and _mixes_weighed_values(trace, nodes):
        return "weighs values by activations before it mixes positions by a table, as attention-free transformers do"
    sums = [node for node in nodes if "?" in (_sums_products(trace, node) or ())]
    if not has_kernel and not all(_has_positions(trace, node) for node in sums):
        return "sums products of activations over an axis that is not known, as state-space models do"
    if not has_kernel and (_steps_with_products(trace, nodes) or any(_scans(trace, node) for node in nodes)):
        return "runs from position to position with products of activations, as RWKV and linear attention do"
    return None


def _mixes_weighed_values(trace: Trace, nodes: Sequence[Node]) -> bool:
    """Whether a matrix of no layer mixes positions of values that an exponential of activations has weighed."""
    members = {node.index for node in nodes}
    exponentials = {node.index for node in nodes if node.varying and node.op in ("exp", "softmax", "sigmoid")}
    weighed = [
        node.index
        for node in nodes
        if _is_product_of_activations(trace, node) and exponentials & (set(node.inputs) | _before(trace, node, members))
    ]
    mixing = [n for n in nodes if n.varying and n.op in _MATRIX_PRODUCTS and n.axis != "C"]
    return any(
        trace.is_ancestor(i, n.index) and sum(trace.nodes[k].varying for k in set(n.inputs)) == 1
        for n in mixing
        for i in weighed
    )


def _steps_with_products(trace: Trace, nodes: Sequence[Node]) -> bool:
    """Whether positions are computed one after the other, with a product of activations that several of them depend on."""
    products = [node.index for node in nodes if _is_product_of_activations(trace, node)]
    layers = [node for node in nodes if node.op == "linear" and node.varying]
    n_positions = max((node.n_vectors for node in layers), default=0)
    for steps in _step_results(trace, nodes):
        n_stepped = sum(trace.nodes[i].n_vectors for i in steps)
        is_series = len(steps) > 2 and n_stepped <= max(n_positions, len(steps))
        if is_series and any(sum(trace.is_ancestor(i, step) for step in steps) > 1 for i in products):
            return True
    return False


def _step_results(trace: Trace, nodes: Sequence[Node]) -> list[list[int]]:
    """Return the values that a stack or concatenation joins, and those that are written to one tensor after another."""
    joined = [[i for i in node.inputs if trace.nodes[i].varying] for node in nodes if node.op in ("stack", "cat")]
    assignments = [list(node.inputs) for node in nodes if node.op == "__setitem__" and node.varying]
    writes = [inputs[-1] for inputs in assignments if 0 < len(inputs) < 3 and trace.nodes[inputs[-1]].varying]
    return [*joined, writes]


def _is_product_of_activations(trace: Trace, node: Node) -> bool:
    is_product = node.op in _PRODUCTS or node.op in _MATRIX_PRODUCTS or node.op == "einsum"
    factors = sum(trace.nodes[i].varying for i in set(node.inputs))
    return is_product and factors > 1 and not is_norm(trace, node)


def _before(trace: Trace, node: Node, members: set[int]) -> set[int]:
    """Return the nodes of a branch of which a product's factors are made by elementwise functions and rearrangements alone."""
    reached, waiting = set[int](), list(node.inputs)
    while waiting:
        index = waiting.pop()
        if index in members and index not in reached and not _is_layer(trace.nodes[index]):
            reached.add(index)
            waiting.extend(trace.nodes[index].inputs)
    return reached


class _SinceLayers(NamedTuple):
    """What lies between the last layers of a branch with attention and a value that is made of their results.

    Attributes:
        follows_attention: Whether one of these layers comes after the attention.
        is_activated: Whether an activation has run since.
    """

    follows_attention: bool
    is_activated: bool


def holds_mlp(trace: Trace, region: Collection[int]) -> bool:
    """Whether a branch with attention holds an MLP too: two layers around an activation that make no queries, keys or values.

    A gate of the attention's result is none.
    """
    attention = [i for i in region if trace.nodes[i].attention or weighs_positions(trace, trace.nodes[i])]
    after = {i for i in region if i in attention or any(trace.is_ancestor(k, i) for k in attention)}
    before = {i for i in region if any(trace.is_ancestor(i, k) for k in attention)}
    since_layers: dict[int, _SinceLayers] = {}  # by node; none before the first layer
    for index in sorted(region):
        node = trace.nodes[index]
        if not node.varying or index in attention or in_gate(trace, node):
            continue
        operands = [since_layers[i] for i in node.inputs if i in since_layers]
        if _is_layer(node):
            # before the attention, a layer behind an activation may make queries, keys or values
            if any(x.is_activated and (x.follows_attention or index not in before) for x in operands):
                return True
            since_layers[index] = _SinceLayers(index in after, is_activated=False)
        elif operands and not _meets_attention(trace, node, after):
            is_activation = node.op in ACTIVATIONS or node.op == "glu"
            since_layers[index] = _SinceLayers(
                follows_attention=any(x.follows_attention for x in operands),
                is_activated=is_activation or any(x.is_activated for x in operands),
            )
    return False


def _meets_attention(trace: Trace, node: Node, after: Collection[int]) -> bool:
    """Whether a function adds or multiplies a value that comes after the attention and another one, as a gate does."""
    sides = {i in after for i in node.inputs if trace.nodes[i].varying}
    return (node.op in _PRODUCTS or node.op in ADDITIONS) and len(sides) > 1


def _weighs_moved(trace: Trace, node: Node, region: Collection[int]) -> bool:
    """Whether a softmax weighs values at one position that the branch has moved there from others, as local attention does."""
    moves = (trace.nodes[i] for i in region if trace.is_ancestor(i, node.index)) if node.mixture > 1 else ()
    return any(other.op in _MOVES or is_spatial(trace, other) for other in moves)


def is_attention(node: Node) -> bool:
    """Whether a function is attention of more than one query."""
    return node.fused or node.attention > 1


def weighs_positions(trace: Trace, node: Node) -> bool:
    """Whether a sum over positions weighs them by activations; over an axis that is not known, by a softmax."""
    axes = _sums_products(trace, node)
    if axes is None or axes == {"C"} or _scans(trace, node):
        return False
    weighed = any(trace.nodes[i].weighed for i in node.inputs)
    return bool(axes & set("LHW")) or (weighed and not _has_positions(trace, node))


def _has_positions(trace: Trace, node: Node) -> bool:
    """Whether the positions stay apart in a sum over another axis, so that it mixes experts."""
    moved = any(
        trace.nodes[i].op in _MOVES for i in trace.ancestors(node.inputs) if i >= trace.calls[node.stack[-1]].start
    )
    return bool(set(node.axes.names) & set("LHW")) and not moved


def _sums_products(trace: Trace, node: Node) -> set[str] | None:
    """Return the meanings of the axes over which products of activations are summed; None for another function."""
    product, factors = _summed_product(trace, node)
    if product is None:
        return None
    return {name for d in node.dims for name in _meanings(product, factors, d - len(product.shape))}


def _summed_product(trace: Trace, node: Node) -> tuple[Node | None, list[Node]]:
    """Return the product of activations that a function sums over an axis, and its factors; None for another function."""
    if node.op in ("sum", "cumsum") and node.varying:
        for product in (trace.nodes[i] for i in node.inputs):
            factors = [trace.nodes[k] for k in set(product.inputs) if trace.nodes[k].varying]
            if product.op in _PRODUCTS and len(factors) > 1:
                return product, factors
    return None, []


def _scans(trace: Trace, node: Node) -> bool:
    """Whether a function computes the states of a recurrence with activations as factors, one channel apart from the others.

    The running sum of outer products of keys and values is causal attention and none.
    """
    if node.op in ("cumprod", "logcumsumexp"):
        return node.varying
    product, factors = _summed_product(trace, node)
    return node.op == "cumsum" and product is not None and all(n.shape == product.shape for n in factors)


def _meanings(product: Node, factors: Sequence[Node], axis: int) -> set[str]:
    """Return what an axis, counted from the last one, means in values that are broadcast to each other."""
    size = product.shape[axis]
    nodes = [n for n in factors if len(n.shape) >= -axis and n.shape[axis] == size] or [product]
    return {n.axes.names[axis] for n in nodes}


def is_spatial(trace: Trace, node: Node) -> bool:
    """Whether a convolution covers more than one position of a map."""
    if not node.op.startswith("conv") or not node.varying:
        return False
    is_channel_filter = node.op == "conv1d" and node.weight[:2] == (1, 1)  # a gate over channels
    return prod(node.weight[2:]) != 1 and not is_channel_filter  # (out, in, *kernel)


def is_inverted_bottleneck(trace: Trace, region: Collection[int]) -> bool:
    """Whether a branch expands channels, applies depthwise kernels alone, and projects back."""
    layers = [trace.nodes[i] for i in sorted(region) if _is_layer(trace.nodes[i]) and trace.nodes[i].varying]
    layers = [node for node in layers if not in_gate(trace, node)]
    kernels = [node for node in layers if is_spatial(trace, node)]
    if len(layers) < 3 or not kernels or is_spatial(trace, layers[0]) or is_spatial(trace, layers[-1]):
        return False
    return all(len(node.weight) > 2 and node.weight[1] == 1 for node in kernels)


def mixes_channels(trace: Trace, region: Collection[int]) -> bool:
    """Whether a branch holds a layer that mixes channels: a linear layer or a convolution that is not depthwise."""
    layers = [trace.nodes[i] for i in region if _is_layer(trace.nodes[i])]
    return any(
        node.op == "linear" or len(node.weight) < 2 or node.weight[1] > 1 for node in layers if not in_gate(trace, node)
    )


def in_gate(trace: Trace, node: Node) -> bool:
    """Whether a function runs in squeeze and excitation or another gate of channels."""
    return any(gates_channels(module) for module in trace.modules(node))


def _is_layer(node: Node) -> bool:
    if node.op in ("matmul", "__matmul__", "einsum"):
        return bool(node.parameters)
    return node.op == "linear" or node.op.startswith("conv")
