"""Layers between residual units: pooling, patch merging, blocks without a shortcut, attention that is not residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from vitscope.core.tap import Kind
from vitscope.models.tracing.additions import ACTIVATIONS, is_attention_pooling, is_norm
from vitscope.models.tracing.graph import Call, Node, Trace
from vitscope.models.tracing.kinds import in_gate, is_attention, kind_of
from vitscope.models.tracing.units import TracedUnit, n_positions

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.Identity)


@dataclass(frozen=True)
class LayerBetween:
    """A module between units that adds to no stream.

    Attributes:
        call: The layer's call in the pass.
        kind: ``pool`` for pooling and for one layer that makes the map smaller, else what it computes.
        parameters: Names of the parameters that it uses.
        n_positions: Positions of its result.
        subsamples: Whether its result has fewer positions than its input.
        like_units: Whether units have blocks of its type, as an inverted residual of another stride.
    """

    call: Call
    kind: Kind
    parameters: tuple[str, ...]
    n_positions: int
    subsamples: bool
    like_units: bool


class Body:
    """The part of a pass from the first unit to the last one, with further blocks of the same types.

    Attributes:
        owners: Unit of each node that belongs to one.
    """

    def __init__(self, trace: Trace, units: Sequence[TracedUnit]) -> None:
        self.trace, self.units = trace, units
        self.owners = {i: unit for unit in reversed(units) for i in (*unit.nodes, unit.addition.result)}
        marks = [index in self.owners for index in range(len(trace.nodes))]
        self._counts = list(accumulate(marks, initial=0))
        self._results = [unit.addition.result for unit in units]
        self._block_types = tuple({kind for unit in units if (kind := type(self._block(unit))) not in _CONTAINERS})
        block_calls = {type(call.module): set[int]() for unit in units for call in self._calls_of(unit)}
        for unit in units:
            for call in self._calls_of(unit):
                block_calls[type(call.module)].add(call.index)
        repeated = tuple(kind for kind, indices in block_calls.items() if len(indices) > 1 and kind not in _CONTAINERS)
        self._repeated_types = set(repeated).intersection(self._block_types)
        # the body may end with blocks like those of units without a shortcut, or with what a stage makes of its blocks
        like_units = [c for c in trace.calls if isinstance(c.module, self._block_types) and self._is_free(c)]
        in_block = {i for call in like_units for i in range(call.start, call.end)}
        self._block_counts = list(accumulate((i in in_block for i in range(len(trace.nodes))), initial=0))
        stages = [call for call in trace.calls if isinstance(call.module, repeated)]
        ends = [*self._results, *(call.output for call in (*like_units, *stages) if call.output >= 0)]
        self.last = max(ends)
        self._before = trace.ancestors(ends)

    def _is_free(self, call: Call) -> bool:
        """Whether a call holds no part of a unit."""
        return self._counts[call.end] == self._counts[call.start]

    def _calls_of(self, unit: TracedUnit) -> list[Call]:
        return [self.trace.calls[i] for i in self.trace.nodes[unit.addition.result].stack[1:]]

    def _block(self, unit: TracedUnit) -> nn.Module:
        """Return the module of a unit's addition, or the one around it that holds all layers of the branch."""
        call = self.trace.calls[self.trace.nodes[unit.addition.result].stack[-1]]
        layers = [i for i in unit.addition.region if self.trace.nodes[i].weight and self.trace.nodes[i].varying]
        while call.parent > 0 and min(layers, default=call.start) < call.start:
            call = self.trace.calls[call.parent]
        return call.module

    def precedes(self, node: Node) -> bool:
        """Whether the sum of a unit depends on a node."""
        return node.index in self._before

    def follows(self, node: Node) -> bool:
        """Whether a node depends on the sum of a unit."""
        return any(self.trace.is_ancestor(result, node.index) for result in self._results)

    def layers(self) -> list[LayerBetween]:
        """Return the layers between units in the order of execution."""
        calls: dict[int, Call] = {}
        for node in self.trace.nodes[1:]:
            if node.index in self.owners or not node.varying or in_gate(self.trace, node):
                continue
            call = self._call_between(node)
            if call is not None and (node.parameters or is_attention(node) or _pools(self.trace, node)):
                calls.setdefault(call.index, call)
        return [layer for call in calls.values() if (layer := self._layer(call)) is not None]

    def _call_between(self, node: Node) -> Call | None:
        """Return the outermost module call around a node that holds no unit, if it stands in the body."""
        calls = [self.trace.calls[i] for i in node.stack[1:]]
        free = [c for c in calls if self._is_free(c)]
        block = next((c for c in free if isinstance(c.module, self._block_types)), None) if self._block_types else None
        if block is not None:  # a block like those of the units, without a shortcut
            return block
        if not free or not self.precedes(node) or not (self.follows(node) or self._in_repeated_block(calls)):
            return None
        free = [c for c in free if self._block_counts[c.end] == self._block_counts[c.start]]
        if not free:
            return None
        # the parts of a plain series are layers of their own; a norm belongs to the one layer behind it
        return next((c for c in free if not isinstance(c.module, _CONTAINERS) or self._n_layers(c) == 1), free[-1])

    def _in_repeated_block(self, calls: Sequence[Call]) -> bool:
        """Whether a module around a node is a block of units: before the first one, layers of its block are no stem."""
        return any(type(c.module) in self._repeated_types for c in calls)

    def _n_layers(self, call: Call) -> int:
        return sum(bool(n.weight) and n.varying for n in self.trace.nodes[call.start : call.end])

    def _layer(self, call: Call) -> LayerBetween | None:
        nodes = [n for n in self.trace.nodes[call.start : call.end] if not is_norm(self.trace, n)]
        kind = kind_of(self.trace, [n.index for n in nodes])
        if kind is None or call.output < 0:
            return None
        weights = [n for n in nodes if n.weight and n.varying]
        result = n_positions(self.trace, call.output)
        subsamples = call.first_input >= 0 and self._positions_before(call, weights) > result
        if kind in ("conv", "mlp") and subsamples and not any(n.op in ACTIVATIONS for n in nodes):
            kind = "pool"
        elif kind == "mlp" and all(n.op.startswith("conv") for n in weights):
            kind = "conv"
        elif kind == "pool" and not subsamples:
            return None
        names = dict.fromkeys(name for n in self.trace.nodes[call.start : call.end] for name in n.parameters)
        like_units = isinstance(call.module, self._block_types) if self._block_types else False
        return LayerBetween(call, kind, tuple(names), result, subsamples, like_units)

    def _positions_before(self, call: Call, weights: Sequence[Node]) -> int:
        node = self.trace.nodes[call.first_input]
        if len(node.shape) == 4 and node.axes.channel is None and weights and weights[0].op == "conv2d":
            return node.shape[2] * node.shape[3]
        return n_positions(self.trace, call.first_input)

    def uncovered_attention(self, layers: Sequence[LayerBetween]) -> Iterator[Node]:
        """Yield attention that belongs neither to a unit nor to a layer between units, nor is pooling in the head."""
        for node in self.trace.nodes:
            inside = any(layer.call.index in node.stack for layer in layers)
            if is_attention(node) and node.index not in self.owners and not inside and not self._pools_in_head(node):
                yield node

    def _pools_in_head(self, node: Node) -> bool:
        """Whether attention behind the last unit pools tokens: by its module's name, or by queries that no image changes."""
        named = any(is_attention_pooling(module) for module in self.trace.modules(node))
        return node.index > self.last and (named or not self._query_varies(node))

    def _query_varies(self, node: Node) -> bool:
        return not node.fused or self.trace.nodes[node.inputs[0]].varying if node.inputs else True


def _pools(trace: Trace, node: Node) -> bool:
    return isinstance(trace.calls[node.stack[-1]].module, nn.MaxPool2d | nn.AvgPool2d)
