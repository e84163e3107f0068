"""Find the residual additions of a traced pass: a stream and a branch that was computed from the same value.

An addition ``s + b`` is residual if the shortcut leads from a value to ``s`` through at most one layer, pooling and norms, and
the branch leads from the same value to ``b`` through what the unit computes. Other sums (of streams of several resolutions, of
two branches) are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from vitscope.models.tracing.graph import Node, Trace

#: functions that add two tensors, the second with a minus sign
DIFFERENCES = frozenset({"sub", "sub_", "__sub__", "__isub__", "subtract"})
ADDITIONS = DIFFERENCES | {"add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_", "lerp", "lerp_"}
#: the sum of a stack of tensors, over the axis of the stack; it adds as well, though no function of that name runs
STACKED_SUM = "sum of stack"
#: functions that give the elements of their argument another place or a constant scale
IDENTITIES = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "T", "mT", "contiguous", "clone",
    "dropout", "dropout_", "dropout2d", "feature_dropout", "type_as", "to", "float", "half", "squeeze", "unsqueeze", "expand",
    "_unsafe_view", "alias", "detach", "identity", "type", "double", "bfloat16",
})  # fmt: skip
#: further functions of a shortcut or between an addition and the next branch
_PASSING = frozenset({
    "pad", "max_pool2d", "avg_pool2d", "max_pool2d_with_indices", "boolean_dispatch", "_max_pool2d",
    "mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "__getitem__", "cat", "concat",
    "amax", "max", "roll", "max_pool1d", "avg_pool1d", "interpolate", "add", "__add__",
})  # fmt: skip
#: functions that give a multiple of a value where it is the only one that they take, as a value plus itself
_MULTIPLES = frozenset({"mul", "__mul__", "__rmul__", "div", "__truediv__", "add", "__add__", "__radd__"})
ACTIVATIONS = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "elu", "leaky_relu", "leaky_relu_", "mish", "hardswish", "hardtanh",
    "prelu", "sigmoid", "tanh", "clamp", "clamp_", "softplus",
})  # fmt: skip
#: layers of weights on a shortcut
_LAYERS = frozenset({"conv2d", "linear", "conv1d"})


@dataclass(frozen=True)
class Addition:
    """A residual addition.

    Attributes:
        result: Node of the sum.
        stream: Node of the operand that carries the stream.
        branch: Node of the operand that the unit adds.
        source: Node from which the branch and, through a projection where there is one, the stream were computed.
        region: Nodes of the branch, with what serves it alone.
        shortcut: Nodes of a projection between source and stream.
    """

    result: int
    stream: int
    branch: int
    source: int
    region: frozenset[int]
    shortcut: frozenset[int]


def residual_additions(trace: Trace) -> list[Addition]:
    """Return the residual additions that stand for units, in the order of execution.

    An addition inside the branch of another one belongs to that branch, unless the outer addition only bridges a series of
    units on its own stream; then the outer one is no unit.
    """
    accepted: dict[int, Addition] = {}
    for node in trace.nodes:
        addition = _addition(trace, node, accepted)
        if addition is not None:
            accepted[node.index] = addition
    return [part for addition in _outermost(trace, list(accepted.values())) for part in _side_by_side(trace, addition)]


def _addition(trace: Trace, node: Node, accepted: dict[int, Addition]) -> Addition | None:
    if node.op not in (*ADDITIONS, STACKED_SUM) or not node.varying:
        return None
    operands = list(dict.fromkeys(node.inputs))
    if len(operands) != 2 or len(node.inputs) != 2:
        return None
    if any(trace.nodes[i].shape != node.shape for i in operands):
        return None
    orders = [operands] if node.op in DIFFERENCES else [operands, operands[::-1]]
    options = [
        _oriented(trace, node.index, stream, branch, accepted)
        for stream, branch in orders
        if trace.nodes[branch].varying
    ]
    # the operand with the shorter way is the stream
    additions = [option for option in options if option is not None]
    return min(additions, key=lambda option: (len(option.shortcut), -len(option.region)), default=None)


def _oriented(trace: Trace, result: int, stream: int, branch: int, accepted: dict[int, Addition]) -> Addition | None:
    """Return the addition with ``stream`` as its shortcut; None where no short way leads from it to a source of ``branch``."""
    start = stream
    way = _shortcut(trace, start, branch)
    while way is None:
        # attention and MLP side by side: the sum so far carries the stream
        origin = _through_identities(trace, start)
        if origin not in accepted:
            return None
        start = accepted[origin].stream
        way = _shortcut(trace, start, branch)
    source, shortcut = way
    region = trace.between(source, branch) - shortcut
    if start != stream:  # the branches that the sum so far holds are units of their own
        shortcut = frozenset()
        region -= {i for other in accepted.values() if other.result <= stream for i in other.region}
    if not any(_computes(trace.nodes[i]) for i in region):
        return None
    has_map = _has_positions(trace.nodes[source]) and len(trace.nodes[result].shape) > 2
    if any(_has_layer(trace.nodes[i]) for i in shortcut) and not has_map:
        return None  # two classifiers, of one vector or of two tokens
    parallel = any(trace.nodes[i].parameters for i in shortcut) or _is_sum(trace, branch)
    if parallel and not any(is_nonlinear(trace, i) for i in region):
        return None  # parallel kernels that are one layer (structural reparameterization)
    block = trace.calls[trace.nodes[result].stack[-1]]
    if any(trace.nodes[i].parameters and i < block.start for i in shortcut):
        return None  # streams that parted in an earlier block
    if any(is_attention_pooling(module) for module in trace.modules(trace.nodes[result])):
        return None
    closed = trace.with_private_sources(region, source) - shortcut
    return Addition(result, stream, branch, source, frozenset(closed), shortcut)


def _shortcut(trace: Trace, stream: int, branch: int) -> tuple[int, frozenset[int]] | None:
    """Return the source of a branch and the nodes from it to the stream: at most one layer of weights, no activation."""
    way: list[int] = []
    current, n_layers = stream, 0
    for _ in range(24):
        node = trace.nodes[current]
        if trace.is_ancestor(current, branch):
            return current, frozenset(way)
        sources = [i for i in node.inputs if trace.nodes[i].varying]
        if node.op in _LAYERS or node.op.startswith("conv"):
            n_layers += 1
            if n_layers > 1:
                return None
        elif not (node.op in IDENTITIES or node.op in _PASSING or is_norm(trace, node)):
            return None
        sources = list(dict.fromkeys(sources))
        if len(sources) != 1:
            return None
        way.append(current)
        current = sources[0]
    return None


def _through_identities(trace: Trace, index: int) -> int:
    while trace.nodes[index].op in IDENTITIES:
        sources = [i for i in trace.nodes[index].inputs if trace.nodes[i].varying]
        if len(sources) != 1:
            break
        index = sources[0]
    return index


def is_norm(trace: Trace, node: Node) -> bool:
    """Whether a function is a normalization, or runs inside a module that is one."""
    return "norm" in node.op or any(is_norm_module(trace.calls[i].module) for i in node.stack[-1:])


def is_norm_module(module: nn.Module) -> bool:
    """Whether a module is a normalization by its class name, and holds no layer of weights."""
    holds_layers = any(isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear) for m in module.modules())
    return "norm" in type(module).__name__.lower() and not holds_layers


def _computes(node: Node) -> bool:
    """Whether a branch with this function is more than a scaled stream."""
    op = node.op
    mixes = op in ("linear", "roll", "lstm", "einsum", "matmul", "__matmul__", "bmm") or op.startswith(("conv", "fft"))
    return mixes or "pool" in op or bool(node.attention)


def _outermost(trace: Trace, additions: list[Addition]) -> list[Addition]:
    """Drop additions inside the branches of others, and outer ones that only bridge units on the same stream."""
    remaining = dict.fromkeys(sorted(additions, key=lambda a: (-len(a.region), a.result)))
    for outer in list(remaining):
        if outer not in remaining:
            continue
        inner = [a for a in remaining if a is not outer and a.result in outer.region]
        if not inner:
            continue
        if _is_bridge(trace, outer, inner) or _is_detour(trace, outer, inner):
            del remaining[outer]
            fusion = None if _is_detour(trace, outer, inner) else fused_part(trace, outer, inner)
            if fusion is not None:
                remaining[fusion] = None
        else:
            for a in inner:
                del remaining[a]
    return sorted(remaining, key=lambda a: a.result)


def _side_by_side(trace: Trace, addition: Addition) -> list[Addition]:
    """Return the parts of a branch that is a sum of attention and something else, ``x + (attention(x) + mlp(x))``, else itself.

    What both compute first belongs to the first one.
    """
    index = _through_identities(trace, addition.branch)
    node = trace.nodes[index]
    terms = list(dict.fromkeys(node.inputs))
    if node.op not in ADDITIONS - DIFFERENCES or node.scales or len(terms) != 2 or len(node.inputs) != 2:
        return [addition]
    if any(trace.nodes[i].shape != node.shape or not trace.nodes[i].varying for i in terms):
        return [addition]
    ways = [trace.between(addition.source, i) if trace.is_ancestor(addition.source, i) else set() for i in terms]
    separate_nodes = [ways[0] - ways[1], ways[1] - ways[0]]
    if terms[0] in ways[1] or terms[1] in ways[0] or not all(_is_branch(trace, nodes) for nodes in separate_nodes):
        return [addition]
    if sum(any(trace.nodes[i].attention for i in nodes) for nodes in separate_nodes) != 1:
        return [addition]
    rest = trace.with_private_sources(separate_nodes[1], addition.source) - ways[0]
    parts = [
        replace(addition, branch=terms[0], region=addition.region - rest - {index, addition.branch}),
        replace(addition, branch=terms[1], region=frozenset(rest)),
    ]
    return [part for half in parts for part in _side_by_side(trace, half)]


def _is_branch(trace: Trace, nodes: Iterable[int]) -> bool:
    """Whether nodes hold layers and what is not linear in them."""
    members = list(nodes)
    return any(_has_layer(trace.nodes[i]) for i in members) and any(is_nonlinear(trace, i) for i in members)


def _is_bridge(trace: Trace, outer: Addition, inner: Iterable[Addition]) -> bool:
    """Whether a unit inside the outer branch adds to the outer stream itself, or the branch reaches beyond its block."""
    calls = trace.calls
    block = calls[trace.nodes[outer.result].stack[-1]]
    if any(user > outer.result for a in inner for user in _readers(trace, a.result)):
        return True  # the inner sum goes on as a stream beside the outer one, as in reversible networks
    if any(_has_layer(trace.nodes[i]) and i < block.start for i in outer.region if trace.nodes[i].varying):
        return True
    for a in inner:
        if a.stream != outer.source and not trace.is_ancestor(outer.source, a.stream):
            return True  # it adds to a stream that the outer source is no part of
        if _is_multiple(trace, a.stream, outer.source):
            return True  # it adds to the outer stream
    return False


def _is_multiple(trace: Trace, index: int, source: int) -> bool:
    """Whether a node is a source itself, or made of it by a few rearrangements and multiplications by constants."""
    for _ in range(24):
        if index == source:
            return True
        node = trace.nodes[index]
        sources = list({i for i in node.inputs if trace.nodes[i].varying})
        if not (node.op in IDENTITIES or node.op in _MULTIPLES) or len(sources) != 1:
            return False
        index = sources[0]
    return False


def _is_detour(trace: Trace, outer: Addition, inner: Iterable[Addition]) -> bool:
    """Whether the outer branch leads through blocks of other units on a smaller map, as the skips of a U-Net that adds them."""
    size = _n_values_of_channel(trace, outer.source)
    outside = trace.nodes[outer.result].stack
    for a in inner:
        block = trace.calls[trace.nodes[a.result].stack[-1]]
        is_block = block.index not in outside and block.first_input == a.source and block.output >= a.result
        if is_block and _n_values_of_channel(trace, a.result) < size and _has_values_of(trace, a.result, block.output):
            return True
    return False


def _has_values_of(trace: Trace, index: int, output: int) -> bool:
    """Whether a block returns a sum, behind its activation, its norm or a rearrangement at most."""
    for _ in range(8):
        if output == index:
            return True
        node = trace.nodes[output]
        sources = [i for i in node.inputs if trace.nodes[i].varying]
        if len(sources) != 1 or not (node.op in IDENTITIES or node.op in ACTIVATIONS or is_norm(trace, node)):
            return False
        output = sources[0]
    return False


def _n_values_of_channel(trace: Trace, index: int) -> int:
    """Return the number of positions of a value, channels taken to be last where they are not known."""
    node = trace.nodes[index]
    channel = node.axes.channel if node.axes.channel is not None else len(node.shape) - 1
    return node.n_values // max(node.shape[channel], 1) if node.shape else 1


def _readers(trace: Trace, index: int) -> set[int]:
    """Return the functions that read a value, also behind rearrangements of it."""
    readers, waiting = set[int](), [index]
    while waiting:
        for user in trace.consumers[waiting.pop()]:
            if trace.nodes[user].op in IDENTITIES:
                waiting.append(user)
            else:
                readers.add(user)
    return readers


def fused_part(trace: Trace, outer: Addition, inner: Iterable[Addition]) -> Addition | None:
    """Return what a bridge adds beyond the units inside it, as a projection of another stream; None where it has no layer."""
    last = max(a.result for a in inner)
    region = frozenset(i for i in outer.region if i > last and trace.is_ancestor(last, i))
    if not any(_has_layer(trace.nodes[i]) for i in region):
        return None
    covered = {i for a in inner for i in a.region}
    closed = trace.with_private_sources(region, outer.source) - covered - outer.shortcut - {a.result for a in inner}
    closed = {i for i in closed if i > last or not trace.nodes[i].varying}
    return replace(outer, source=last, region=frozenset(closed))


def _has_layer(node: Node) -> bool:
    return node.op in _LAYERS or node.op.startswith("conv")


def is_attention_pooling(module: nn.Module) -> bool:
    """Whether a module pools tokens by attention, which is part of a head, by the names of timm's, SigLIP's and usual ones."""
    name = type(module).__name__.lower()
    return name.startswith(("attentionpool", "attnpool", "rotattentionpool")) or "attentionpooling" in name


def _is_sum(trace: Trace, index: int) -> bool:
    node = trace.nodes[_through_identities(trace, index)]
    return node.op in ADDITIONS and sum(trace.nodes[i].varying for i in set(node.inputs)) > 1


def is_nonlinear(trace: Trace, index: int) -> bool:
    """Whether a function is an activation, a normalization over channels, attention or a product of activations."""
    node = trace.nodes[index]
    factors = sum(trace.nodes[i].varying for i in set(node.inputs))
    product = node.op in ("mul", "__mul__", "__imul__", "mul_", "matmul", "__matmul__") and factors > 1
    others = ("softmax", "layer_norm", "rms_norm", "glu", "square", "pow", "__pow__", "exp", "sin", "cos", "abs", "erf")
    return node.op in ACTIVATIONS or node.op in others or product or bool(node.attention)


def _has_positions(node: Node) -> bool:
    return len(node.shape) > 2 and node.n_values > node.shape[0] * max(node.shape[1:])
