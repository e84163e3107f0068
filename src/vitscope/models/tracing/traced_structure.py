"""Structure of a network from one forward pass: units, layers between them, and the kind and stage of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vitscope.core.tap import Kind
from vitscope.models.structure.residual_structure import (
    TOKENS,
    ModelComponent,
    ResidualUnit,
    in_auxiliary_head,
)
from vitscope.models.tracing.graph import Node, Trace
from vitscope.models.tracing.kinds import doubt_about, holds_mlp, mixes_channels
from vitscope.models.tracing.layers_between import Body, LayerBetween
from vitscope.models.tracing.reads import read_call
from vitscope.models.tracing.units import TracedUnit, described, traced_units

Place = tuple[Kind, int]
_POSITIONS = ("pos_embed", "pos_embedding", "position_embeddings", "cls_pos")


@dataclass(frozen=True)
class TracedStructure:
    """Components in the order of execution, and the place of every parameter.

    Attributes:
        components: Residual units and layers between them.
        places: Kind and stage of each parameter by name.
        uncovered: Messages about modules that belong to no unit; the first one is raised by measures that speak of kinds.
        unclear: Messages about parameters without a certain place.
        unused: Names of the parameters that the pass does not use and that have the place of the module around them.
        with_mlp: Names of units of kind ``msa`` whose branch holds an MLP too.
        doubts: Messages about units and layers whose kind is not certain.
    """

    components: list[ModelComponent]
    places: dict[str, Place]
    uncovered: list[str]
    unclear: list[str]
    unused: list[str]
    doubts: list[str]
    with_mlp: list[str]


def traced_structure(model: nn.Module, trace: Trace) -> TracedStructure | None:
    """Return the structure that a traced pass shows; None for a network that is not residual.

    A network is residual if blocks of its units hold more parameters than the layers between them that keep the size of the
    map, if its units mix channels, and if its sums go on as a stream: ConvMixer, whose residual depthwise convolutions stand
    between plain 1x1 convolutions, is none, nor is NASNet, whose sums are concatenated.
    """
    units = traced_units(trace)
    concatenated = [unit for unit in units if _is_only_concatenated(trace, unit.addition.result)]
    if len(units) <= 2 * len(concatenated):
        return None
    body = Body(trace, units)
    layers = body.layers()
    if any(layer.kind == "conv" and not layer.like_units for layer in layers) and not any(
        mixes_channels(trace, unit.nodes) for unit in units
    ):
        return None
    plain = [c for c in layers if c.kind in ("conv", "mlp") and not c.like_units and not c.subsamples]
    if _n_parameters(model, plain) > _n_parameters(model, [*units, *(layer for layer in layers if layer.like_units)]):
        return None
    components = _components(trace, units, layers)
    places, unclear, unused = _places(model, trace, body, layers, components)
    modules = dict.fromkeys(_owner(trace, node) for node in body.uncovered_attention(layers))
    uncovered = [f"attention module {name} is not part of a known unit" for name in modules]
    with_mlp = [unit.name for unit in units if unit.kind == "msa" and holds_mlp(trace, unit.addition.region)]
    return TracedStructure(components, places, uncovered, unclear, unused, _doubts(trace, units, layers), with_mlp)


def _doubts(trace: Trace, units: Sequence[TracedUnit], layers: Sequence[LayerBetween]) -> list[str]:
    """Return messages about parts that are no attention for certain and run what may be it."""
    regions = [(unit.name, unit.kind, unit.addition.region) for unit in units]
    regions += [(layer.call.path, layer.kind, frozenset(range(layer.call.start, layer.call.end))) for layer in layers]
    reasons = [(name, doubt_about(trace, region)) for name, kind, region in regions if kind != "msa"]
    return [f"the kind of {name} is not certain: it {reason}" for name, reason in reasons if reason is not None]


def _n_parameters(model: nn.Module, parts: Sequence[TracedUnit | LayerBetween]) -> int:
    names = {name for part in parts for name in part.parameters}
    return sum(p.numel() for name, p in model.named_parameters() if name in names)


def _is_only_concatenated(trace: Trace, index: int) -> bool:
    users = trace.consumers[index]
    return bool(users) and all(trace.nodes[user].op in ("cat", "concat", "concatenate") for user in users)


def _components(trace: Trace, units: Sequence[TracedUnit], layers: Sequence[LayerBetween]) -> list[ModelComponent]:
    """Return units and layers between them in the order of execution, with their stages."""
    ordered = sorted([*units, *layers], key=lambda c: c.addition.result if isinstance(c, TracedUnit) else c.call.end)
    sizes = sorted({c.n_positions for c in ordered if _is_map(trace, c)}, reverse=True)
    components: list[ModelComponent] = []
    stage = 1
    for c in ordered:
        if _is_map(trace, c):
            stage = 1 + sum(size > c.n_positions for size in sizes)
        if isinstance(c, TracedUnit):
            components.append(ModelComponent(c.name, described(trace, c), c.block, stage, c.n_prefix, c.parameters))
        else:
            part = ResidualUnit(
                c.kind, read_call(trace, c.call), subsamples=c.subsamples, stream=read_call(trace, c.call, "input")
            )
            prefix = trace.nodes[c.call.output].axes.n_prefix
            components.append(ModelComponent(c.call.path, part, c.call.module, stage, prefix, c.parameters))
    return components


def _is_map(trace: Trace, part: TracedUnit | LayerBetween) -> bool:
    """Whether the stream has a size there: a class token alone has none, a map of one pixel has."""
    node = trace.nodes[part.addition.result if isinstance(part, TracedUnit) else part.call.output]
    return part.n_positions > 1 or len(node.shape) == 4


def _places(
    model: nn.Module, trace: Trace, body: Body, layers: Sequence[LayerBetween], components: Sequence[ModelComponent]
) -> tuple[dict[str, Place], list[str], list[str]]:
    places: dict[str, Place] = {}
    uncovered: list[str] = []
    for component in components:
        place = (component.part.kind, component.stage)
        for name in component.parameters or ():
            if name in places and places[name][0] != place[0]:
                uncovered.append(f"parameter {name} is shared by units of kinds {places[name][0]} and {place[0]}")
            places.setdefault(name, place)
    head: Place = ("head", max(c.stage for c in components) + 1)
    by_name: dict[str, Place] = {c.name: (c.part.kind, c.stage) for c in components}
    placing = _Placing(trace, body, head, by_name, trace.with_private_tables(set(body.owners)))
    for name, users in trace.parameter_nodes.items():
        if name not in places:
            node = trace.nodes[users[0]]
            place = placing.place(node, name)
            if place is None:
                uncovered.append(_unclear(name, _owner(trace, node)))
            else:
                places[name] = place
    unused = _place_unused(model, places, head, uncovered)
    order = [name for name, _ in model.named_parameters()]
    return {name: places[name] for name in order if name in places}, uncovered, unused


@dataclass(frozen=True)
class _Placing:
    """Places of parameters outside of units, by the first function that uses them.

    Attributes:
        trace: The pass.
        body: The network's units and the layers between them.
        head: Place of the head.
        by_name: Place of each unit and layer between units.
        tables: Nodes of units and of tables, made of parameters alone, that serve only units.
    """

    trace: Trace
    body: Body
    head: Place
    by_name: dict[str, Place]
    tables: set[int]

    def place(self, node: Node, name: str) -> Place | None:
        """Return the place of a parameter that a node uses; None where none is certain."""
        if not node.varying and node.index in self.tables:
            return self._place_of_table(node)
        earlier_units = [u for u in self.body.units if self.trace.is_ancestor(u.addition.result, node.index)]
        if not self.body.precedes(node):
            return self._place_behind(node, earlier_units)
        key = name.rpartition(".")[2]
        if not self.body.follows(node) or key in TOKENS or key in _POSITIONS:
            return ("stem", 0)
        kind, stage = self.by_name[earlier_units[-1].name]
        if node.op.startswith("conv"):
            return ("conv", stage)
        return ("mlp", stage) if node.op == "linear" else (kind, stage)

    def _place_of_table(self, node: Node) -> Place | None:
        """Return the place of the first unit that reads a table."""
        owners = (self.body.owners[i] for i in sorted(self.body.owners) if self.trace.is_ancestor(node.index, i))
        owner = next(owners, None)
        return self.by_name[owner.name] if owner is not None else None

    def _place_behind(self, node: Node, earlier_units: Sequence[TracedUnit]) -> Place | None:
        """Return the place of a parameter on which no unit depends: the head, unless it stands in a block or beside the body."""
        trace, units = self.trace, self.body.units
        blocks = {call: unit for unit in units if (call := _returning_call(trace, unit)) is not None}
        inside = [blocks[call] for call in node.stack[1:] if call in blocks]
        if inside:  # what the block of a unit computes for the output alone
            kind, stage = self.by_name[inside[-1].name]
            if kind == "msa" and node.weight and not trace.is_ancestor(node.index, inside[-1].addition.result):
                kind = "mlp" if node.op == "linear" else "conv"  # attention is in a unit, or reported as not covered
            return (kind, stage)
        # the stream that it reads ends here, or there is a later unit on it: a second head in the middle
        latest = earlier_units[-1] if earlier_units else None
        goes_on = latest is not None and any(
            trace.is_ancestor(latest.addition.result, unit.addition.result) for unit in units
        )
        ends_stream = latest is not None and not goes_on
        if ends_stream or all(i > self.body.last for i in _next_layers(trace, node)):
            return self.head
        return _place_beside(trace, self.body, node, self.by_name[latest.name] if latest is not None else ("stem", 0))


def _place_beside(trace: Trace, body: Body, node: Node, latest: Place) -> Place | None:
    """Return the place of a layer whose way joins that of the last unit in one block, as in cross stage partial networks."""
    last = trace.nodes[body.last]
    shared = [a for a, b in zip(node.stack[1:], last.stack[1:]) if a == b]
    output = trace.calls[shared[-1]].output if shared else -1
    if output < 0 or not (trace.is_ancestor(node.index, output) and trace.is_ancestor(last.index, output)):
        return None
    while not node.weight:
        sources = [i for i in node.inputs if trace.nodes[i].varying]
        if len(sources) != 1:
            return latest
        node = trace.nodes[sources[0]]
    return ("conv" if node.op.startswith("conv") else "mlp", latest[1])


def _returning_call(trace: Trace, unit: TracedUnit) -> int | None:
    """Return the call of a unit's block; None if it returns another shape than the stream's, as one that holds the head too."""
    sum_ = trace.nodes[unit.addition.result]
    output = trace.calls[sum_.stack[-1]].output
    return sum_.stack[-1] if output >= 0 and trace.nodes[output].shape == sum_.shape else None


def _next_layers(trace: Trace, node: Node) -> set[int]:
    """Return a layer of weights itself, or the first layers behind a norm or table."""
    layers, waiting, visited = set[int](), [node.index], set[int]()
    while waiting:
        index = waiting.pop()
        if trace.nodes[index].weight:
            layers.add(index)
            continue
        for user in trace.consumers[index]:
            if user not in visited:
                visited.add(user)
                waiting.append(user)
    return layers or {node.index}


def _unclear(name: str, owner: str) -> str:
    where = "before the end of the last unit without an effect on its output, as in a second head or beside it"
    return f"parameter {name} of {owner} is used {where}"


def _place_unused(model: nn.Module, places: dict[str, Place], head: Place, uncovered: list[str]) -> list[str]:
    """Give parameters that the pass does not use the place of the module around them; return their names."""
    unused = [name for name, _ in model.named_parameters() if name not in places]
    told: list[str] = []
    for name in unused:
        if any(name in text.split() for text in uncovered):
            continue
        around = _places_around(name, places)
        kinds = {kind for kind, _ in around}
        if around and (kinds == {"stem"} or not kinds & {"stem", "head"}):  # a mask token among embeddings
            places[name] = around[-1]
            told.append(name)
        elif "head" in name.split(".")[0] or in_auxiliary_head(model, name):
            places[name] = head
            told.append(name)
        else:
            uncovered.append(f"parameter {name} is not used by the forward pass in eval mode")
    return told


def _places_around(name: str, places: dict[str, Place]) -> list[Place]:
    """Return the places of the parameters in the innermost module around a parameter that has any."""
    path = name.rpartition(".")[0]
    while path:
        around = [place for other, place in places.items() if other.startswith(path + ".")]
        if around:
            return around
        path = path.rpartition(".")[0]
    return []


def _owner(trace: Trace, node: Node) -> str:
    """Return the path of the innermost module with parameters around a node."""
    for i in reversed(node.stack):
        call = trace.calls[i]
        if next(call.module.parameters(), None) is not None:
            return call.path or type(call.module).__name__
    return ""
