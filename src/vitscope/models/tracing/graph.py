"""Graph of the values that one forward pass computes, with the modules that were running."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from vitscope.models.tracing.axes import Axes


@dataclass
class Node:
    """One tensor that a function returned.

    Attributes:
        index: Position in `Trace.nodes`; the images are node 0.
        op: Name of the function.
        inputs: Indices of the nodes of its tensor arguments, parameters left out.
        parameters: Names of the parameters among its arguments.
        shape: The tensor's shape.
        varying: Whether it depends on the images.
        stack: Indices in `Trace.calls` of the modules that were running, outermost first; the model itself is call 0.
        axes: Meaning of the tensor's axes.
        weight: Shape of the weight, for convolutions and linear layers.
        axis: Meaning of the axis that a linear layer mixes or a reduction removes: ``C`` for channels, ``?`` if not known.
        attention: 0, or the number of queries where the function is attention (or its product with the values).
        fused: Whether it is attention as one call.
        mixture: 0, or the number of queries of a product with a softmax that keeps positions apart, as of experts.
        unweighed_product: Whether it is a product of activations, without a softmax or another product, over an axis that may be
            one of positions.
        weighed: Whether it is made of a softmax or a product of activations without a layer.
        dims: Indices of the axes that a reduction removes.
        opaque: Whether the pass does not show what computes it: an operator of an extension, or transformed functions.
        scales: Whether an addition scales what it adds (``alpha``, `torch.addcmul`, `torch.lerp`).
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    varying: bool
    stack: tuple[int, ...]
    axes: Axes
    weight: tuple[int, ...] = ()
    axis: str = "?"
    attention: int = 0
    fused: bool = False
    mixture: int = 0
    unweighed_product: bool = False
    weighed: bool = False
    dims: tuple[int, ...] = ()
    opaque: bool = False
    scales: bool = False

    @property
    def n_values(self) -> int:
        """Number of the tensor's elements."""
        n = 1
        for side in self.shape:
            n *= side
        return n

    @property
    def n_vectors(self) -> int:
        """Number of vectors along the last axis; 1 for a number."""
        return self.n_values // max(self.shape[-1], 1) if self.shape else 1


@dataclass
class Call:
    """One call of a module.

    Attributes:
        index: Position in `Trace.calls`.
        path: Name of the module in the model, empty for the model itself.
        module: The module.
        parent: Index of the call inside which it ran, -1 for the model.
        start: Number of nodes that existed when it began.
        end: Number of nodes that existed when it ended.
        first_input: Node of its first tensor argument, -1 for none.
        output: Node of the first tensor of its result, -1 for none.
        number: 0 for the module's first call in the pass, 1 for the second.
    """

    index: int
    path: str
    module: nn.Module
    parent: int
    start: int
    number: int
    first_input: int = -1
    end: int = -1
    output: int = -1


@dataclass
class Trace:
    """Values and module calls of one forward pass in eval mode, in the order of execution."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @cached_property
    def consumers(self) -> list[list[int]]:
        """For each node the nodes that take it as an argument."""
        consumers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in set(node.inputs):
                consumers[source].append(node.index)
        return consumers

    @cached_property
    def n_calls(self) -> dict[nn.Module, int]:
        """Number of calls of each module in the pass."""
        counts: dict[nn.Module, int] = {}
        for call in self.calls:
            counts[call.module] = counts.get(call.module, 0) + 1
        return counts

    @cached_property
    def parameter_nodes(self) -> dict[str, list[int]]:
        """Nodes that use each parameter, by the parameter's name."""
        users: dict[str, list[int]] = {}
        for node in self.nodes:
            for name in node.parameters:
                users.setdefault(name, []).append(node.index)
        return users

    @cached_property
    def _ancestor_bits(self) -> list[int]:
        bits: list[int] = []
        for node in self.nodes:
            mask = 0
            for source in node.inputs:
                mask |= bits[source] | (1 << source)
            bits.append(mask)
        return bits

    def is_ancestor(self, earlier: int, later: int) -> bool:
        """Whether the value of ``later`` was computed from that of ``earlier``."""
        return bool(self._ancestor_bits[later] >> earlier & 1)

    def between(self, start: int, end: int) -> set[int]:
        """Nodes that were computed from ``start`` and of which ``end`` was computed, ``end`` included."""
        return {
            i
            for i in range(start + 1, end + 1)
            if self.is_ancestor(start, i) and (i == end or self.is_ancestor(i, end))
        }

    def ancestors(self, ends: Iterable[int]) -> set[int]:
        """Nodes of which any of ``ends`` was computed."""
        mask = 0
        for end in ends:
            mask |= self._ancestor_bits[end]
        return {i for i in range(mask.bit_length()) if mask >> i & 1}

    def with_private_sources(self, region: Collection[int], source: int) -> set[int]:
        """Nodes of a region and those that serve it alone, such as bias tables and what only it reads of another stream.

        What was computed from the images before the source of the branch is no part of it, as the stem whose map latent
        vectors read.
        """
        closed = set(region)
        for index in range(max(region, default=0), 0, -1):
            uses = self.consumers[index]
            is_before_source = index < source and self.nodes[index].varying
            if uses and all(use in closed for use in uses) and not is_before_source:
                closed.add(index)
        return closed

    def with_private_tables(self, region: Collection[int]) -> set[int]:
        """Nodes of a region, and values of parameters alone that serve no other node."""
        closed = set(region)
        for index in range(max(region, default=0), 0, -1):
            uses = self.consumers[index]
            if not self.nodes[index].varying and uses and all(use in closed for use in uses):
                closed.add(index)
        return closed

    def modules(self, node: Node) -> list[nn.Module]:
        """Modules that were running at a node, outermost first."""
        return [self.calls[i].module for i in node.stack]
