"""Residual units of a traced pass: name, kind, parameters, and where stream and branch can be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vitscope.core.tap import Kind
from vitscope.models.structure.residual_structure import ResidualUnit
from vitscope.models.tracing.additions import IDENTITIES, Addition, is_norm, residual_additions
from vitscope.models.tracing.graph import Node, Trace
from vitscope.models.tracing.kinds import (
    is_attention,
    is_inverted_bottleneck,
    is_spatial,
    kind_of,
    weighs_positions,
)
from vitscope.models.tracing.reads import read_addend, read_branch, read_input, read_stream, read_sum


@dataclass(frozen=True)
class TracedUnit:
    """A residual unit that a pass has shown.

    Attributes:
        name: Unique name, the module that holds the branch's layers.
        kind: What the branch computes.
        addition: The residual addition.
        nodes: Nodes of branch, shortcut and norms before them.
        parameters: Names of the parameters that these nodes use.
        block: The innermost module in which the addition runs.
        n_positions: Positions of the stream after the addition.
        n_prefix: Prefix tokens of the stream.
    """

    name: str
    kind: Kind
    addition: Addition
    nodes: frozenset[int]
    parameters: tuple[str, ...]
    block: nn.Module
    n_positions: int
    n_prefix: int


def traced_units(trace: Trace) -> list[TracedUnit]:
    """Return the residual units of a pass in the order of execution."""
    units: list[TracedUnit] = []
    results = set()
    for addition in residual_additions(trace):
        nodes = frozenset(addition.region | addition.shortcut | _lead_in(trace, addition, results))
        results.add(addition.result)
        kind = kind_of(trace, addition.region)
        if kind is None:
            continue
        if kind == "conv" and _follows_mixer(trace, addition, units) and is_inverted_bottleneck(trace, addition.region):
            kind = "mlp"
        units.append(_unit(trace, addition, nodes, kind))
    while len(units) > 1 and len(trace.nodes[units[-1].addition.result].shape) == 2 < _n_axes(trace, units[0]):
        units.pop()  # a residual layer of the pooled vector is part of the head
    return _uniquely_named(trace, units)


def _n_axes(trace: Trace, unit: TracedUnit) -> int:
    return len(trace.nodes[unit.addition.result].shape)


def _unit(trace: Trace, addition: Addition, nodes: frozenset[int], kind: Kind) -> TracedUnit:
    sum_ = trace.nodes[addition.result]
    names = dict.fromkeys(name for i in sorted({*nodes, addition.result}) for name in trace.nodes[i].parameters)
    call = trace.calls[sum_.stack[-1]]
    name = branch_name(trace, addition.region) or _name_in_block(trace, addition, kind)
    return TracedUnit(
        name, kind, addition, nodes, tuple(names), call.module,
        n_positions(trace, addition.result), sum_.axes.n_prefix,
    )  # fmt: skip


def described(trace: Trace, unit: TracedUnit) -> ResidualUnit:
    """Return the unit as `vitscope.models.structure` reads and removes it."""
    addition = unit.addition
    branch = read_branch(trace, addition)
    attention = None
    if unit.kind == "msa":
        attention = _attention_module(trace, addition.region, unit.n_positions + unit.n_prefix)
    return ResidualUnit(
        unit.kind,
        read_sum(trace, addition.result),
        read_input(trace, addition),
        branch,
        attention=attention,
        conv3x3=_conv3x3(trace, addition.region) if unit.kind == "conv" else None,
        subsamples=n_positions(trace, addition.source) > unit.n_positions,
        residual=True,
        stream=read_stream(trace, addition),
        added=read_addend(trace, addition) if branch is None or not branch.exact else None,
    )


def n_positions(trace: Trace, index: int) -> int:
    """Return the number of positions of a value, prefix tokens left out; channels are last where their axis is not known."""
    node = trace.nodes[index]
    channel = node.axes.channel if node.axes.channel is not None else len(node.shape) - 1
    return node.n_values // max(node.shape[channel], 1) - node.axes.n_prefix if node.shape else 1


def branch_name(trace: Trace, region: Collection[int]) -> str:
    """Return the path of the innermost module that holds the layers of a branch; of a branch without any, what runs in it."""
    paths, vectors = set(), set()
    for i in region:
        node = trace.nodes[i]
        owners = {name.rpartition(".")[0] for name in node.parameters}
        norm = is_norm(trace, node) or not node.weight
        (vectors if norm else paths).update(owners)
        if not node.parameters and node.op not in IDENTITIES and node.varying:
            vectors.update({trace.calls[node.stack[-1]].path} if "pool" in node.op or node.op == "roll" else ())
    return common_path(paths or vectors)


def _name_in_block(trace: Trace, addition: Addition, kind: Kind) -> str:
    """Return the path of the child of the block in which the functions run that give a branch its kind, else block and kind."""
    block = trace.calls[trace.nodes[addition.result].stack[-1]].path
    nodes = [trace.nodes[i] for i in addition.region]
    tests = {
        "msa": lambda node: bool(node.attention) or weighs_positions(trace, node),
        "conv": lambda node: is_spatial(trace, node),
        "mlp": lambda node: bool(node.weight),
        "pool": lambda node: "pool" in node.op or node.op == "roll",
    }
    path = common_path(trace.calls[node.stack[-1]].path for node in nodes if node.varying and tests[kind](node))
    inside = path.removeprefix(block).lstrip(".") if path.startswith(block) else ""
    return f"{block}.{inside.split('.')[0] or kind}".lstrip(".")


def common_path(paths: Iterable[str]) -> str:
    """Return the longest common path of dotted names."""
    words = [path.split(".") for path in paths]
    if not words:
        return ""
    shared = 0
    while all(len(w) > shared and w[shared] == words[0][shared] for w in words):
        shared += 1
    return ".".join(words[0][:shared])


def _follows_mixer(trace: Trace, addition: Addition, units: Sequence[TracedUnit]) -> bool:
    """Whether the unit before it in the same call of a block is attention or pooling."""
    block = trace.nodes[addition.result].stack[-1]
    same_block = [u for u in units if trace.nodes[u.addition.result].stack[-1] == block]
    return bool(block) and any(u.kind in ("msa", "pool") for u in same_block)


def _lead_in(trace: Trace, addition: Addition, results: Collection[int]) -> set[int]:
    """Return norms and activations before the source that serve branch and shortcut alone."""
    nodes = {*addition.region, *addition.shortcut}
    lead: set[int] = set()
    index = addition.source
    changes = any(not _only_scales(trace, i) for i in addition.shortcut)
    while changes and index not in results:
        node = trace.nodes[index]
        sources = [i for i in node.inputs if trace.nodes[i].varying]
        serves_unit_alone = all(user in nodes or user in lead for user in trace.consumers[index])
        is_norm_or_activation = node.op in IDENTITIES or is_norm(trace, node) or "lu" in node.op
        if not serves_unit_alone or not is_norm_or_activation or len(sources) != 1:
            break
        lead.add(index)
        index = sources[0]
    return lead if any(trace.nodes[i].parameters for i in lead) else set()


def _only_scales(trace: Trace, index: int) -> bool:
    """Whether a function multiplies by a constant, or gives the elements of its argument another place."""
    node = trace.nodes[index]
    is_product = node.op in ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__")
    return node.op in IDENTITIES or (is_product and sum(trace.nodes[i].varying for i in set(node.inputs)) < 2)


def _is_global(trace: Trace, node: Node, n_tokens: int) -> bool:
    """Whether one call of attention (heads, queries, keys) lets each token of the stream see each other one."""
    shapes = [trace.nodes[i].shape for i in node.inputs[:2]]
    batch = trace.nodes[0].shape[0]
    return len(shapes) == 2 and all(len(s) == 4 and s[0] == batch and s[2] == n_tokens for s in shapes)


def _attention_module(trace: Trace, region: Collection[int], n_tokens: int) -> nn.Module | None:
    """Return the module whose heads can be told apart: it calls attention once, of all tokens of the stream."""
    calls = [trace.nodes[i] for i in region if is_attention(trace.nodes[i])]
    if len(calls) != 1 or not calls[0].fused or not _is_global(trace, calls[0], n_tokens):
        return None
    stacks = [calls[0].stack]
    shared = 0
    while all(len(s) > shared and s[shared] == stacks[0][shared] for s in stacks):
        shared += 1
    for index in reversed(stacks[0][:shared]):
        module = trace.calls[index].module
        if next(module.parameters(), None) is not None:
            return module
    return None


def _conv3x3(trace: Trace, region: Collection[int]) -> nn.Conv2d | None:
    """Return the last 3x3 convolution of a branch that keeps the number of channels."""
    for i in sorted(region, reverse=True):
        module = trace.calls[trace.nodes[i].stack[-1]].module
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels == module.out_channels:
            return module
    return None


def _uniquely_named(trace: Trace, units: Sequence[TracedUnit]) -> list[TracedUnit]:
    parameters: dict[str, set[tuple[str, ...]]] = {}
    for unit in units:
        parameters.setdefault(unit.name, set()).add(unit.parameters)
    around = {name[:end] for name in parameters for end, letter in enumerate(name) if letter == "."}
    named, counts = [], dict[str, int]()
    for unit in units:
        name = unit.name
        if len(parameters[name]) > 1 or name in around:  # the module holds another unit too
            child = _name_in_block(trace, unit.addition, unit.kind)
            name = child if child.startswith(f"{name}.") and child not in parameters else f"{name}.{unit.kind}"
        counts[name] = counts.get(name, 0) + 1
        named.append(replace(unit, name=name if counts[name] == 1 else f"{name}:{counts[name]}"))
    return named
