"""Find modules whose output or first input is a value of the pass, to read it by a hook."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Literal

from torch import nn

from vitscope.core.tap import Layout
from vitscope.models.structure.feature_maps import SPATIAL
from vitscope.models.structure.residual_structure import Read, ResidualUnit
from vitscope.models.tracing.additions import ADDITIONS, IDENTITIES, Addition, is_norm, is_norm_module
from vitscope.models.tracing.axes import Axes, unknown
from vitscope.models.tracing.graph import Call, Node, Trace

#: functions that give zeros for zeros, beside rearrangements
_SCALINGS = frozenset(
    {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__", "__getitem__", "roll", "neg", "narrow"}
)
_ACTIVATIONS = (
    "relu", "gelu", "silu", "elu", "leaky_relu", "mish", "hardswish", "hardtanh", "prelu", "sigmoid", "tanh", "clamp", "softplus",
)  # fmt: skip


def read_branch(trace: Trace, addition: Addition) -> Read | None:
    """Return where the branch's output can be read; None where no module returns it.

    The layout is ``unknown`` where the output is scaled or cut before it is added: a lesion may set it to zero, and no
    measure reads it as the branch.
    """
    inside = [
        c for c in trace.calls if c.output in addition.region and c.index not in trace.nodes[addition.result].stack
    ]
    axes = _axes_at(trace, addition)
    exact = [c for c in inside if c.output == addition.branch]
    if exact:
        scales = trace.nodes[addition.result].scales
        layout_axes = unknown(len(axes.names)) if scales else axes
        return replace(_read(trace, exact[-1], "output", layout_axes), exact=not scales)
    for index, same_values in _backward(trace, addition.branch):
        returning = [c for c in inside if c.output == index]
        if returning:
            axes = trace.nodes[index].axes if same_values else unknown(len(trace.nodes[index].shape))
            return replace(_read(trace, returning[-1], "output", axes), exact=same_values)
    return None


def read_addend(trace: Trace, addition: Addition) -> Read | None:
    """Return the branch as an operand of its addition; None where the addition scales it or adds a sum of two branches."""
    node = trace.nodes[addition.result]
    if node.scales or node.op not in ADDITIONS or addition.branch not in node.inputs:
        return None
    read = _read_running(trace, addition.result, _axes_at(trace, addition))
    return replace(read, operand=node.inputs.index(addition.branch))


def read_input(trace: Trace, addition: Addition) -> Read | None:
    """Return where the branch's normalized input can be read; without a norm, the stream."""
    entries = set(_entries(trace, addition))
    norms = [call for call in trace.calls if is_norm_module(call.module) and call.start < call.end]
    for norm in norms:
        reads_all = bool(entries) and entries <= set(range(norm.start, norm.end))
        if reads_all and norm.output in addition.region:
            return _norm_output(trace, norm)
    candidates = [c for c in trace.calls if c.first_input == addition.source and c.start <= addition.result and c.index]
    block = trace.nodes[addition.result].stack[-1]
    inside = [c for c in candidates if c.index == block or block in _ancestors(trace, c)]
    axes = trace.nodes[addition.source].axes
    if axes.layout is None and trace.nodes[addition.source].shape == trace.nodes[addition.result].shape:
        axes = _axes_at(trace, addition)
    if inside:
        return _read(trace, inside[0], "input", axes)
    returning = [c for c in trace.calls if c.output == addition.source and c.index]
    return _read(trace, returning[-1], "output", axes) if returning else None


def read_stream(trace: Trace, addition: Addition) -> Read | None:
    """Return where the stream before the unit can be read: the input of its block, else an input or output of any module."""
    axes = trace.nodes[addition.source].axes
    block = trace.nodes[addition.result].stack[-1]
    taking = [c for c in trace.calls if c.index and c.first_input == addition.source]
    first = next((c for c in taking if c.index == block), taking[0] if taking else None)
    if first is not None:
        return _read(trace, first, "input", axes)
    returning = [c for c in trace.calls if c.index and c.output == addition.source]
    return _read(trace, returning[-1], "output", axes) if returning else None


def read_sum(trace: Trace, result: int, blocks: Collection[int] = ()) -> Read | None:
    """Return where the map after an addition can be read: the output of its block, also behind its activation or norm.

    Inside a block it is read behind a norm too, where the next unit adds to the norm's result.
    """
    stack = trace.nodes[result].stack
    block = trace.calls[stack[-1]]
    axes = trace.nodes[result].axes
    if block.index and block.output >= 0 and block.output in _forward(trace, result, block.end):
        output = trace.nodes[block.output]
        is_reshaped = output.shape != trace.nodes[result].shape
        return _read(trace, block, "output", output.axes if output.axes.layout or is_reshaped else axes)
    norm = _norm_of_stream(trace, result)
    if norm is not None:
        normalized_axes = trace.nodes[norm.output].axes
        return _read(trace, norm, "output", normalized_axes if normalized_axes.layout else axes)
    taking = [c for c in trace.calls if c.first_input == result and c.index]
    if taking:
        return _read(trace, taking[0], "input", axes)
    returning = [c for c in trace.calls if c.output == result and c.index]
    if returning:
        return _read(trace, returning[-1], "output", axes)
    read = _read_rearranged(trace, result)
    if read is None and trace.nodes[result].op in ADDITIONS:
        return _read_running(trace, result, axes)
    return read


def _read_rearranged(trace: Trace, result: int) -> Read | None:
    """Return where a module takes or returns a map after functions that keep it; None where none does."""
    for user in sorted(_forward(trace, result, len(trace.nodes), _keeps_map)):
        axes = trace.nodes[user].axes
        if axes.layout is None:
            continue
        for call in trace.calls:
            if call.index and call.first_input == user:
                return _read(trace, call, "input", axes)
            if call.index and call.output == user:
                return _read(trace, call, "output", axes)
    return None


def _norm_of_stream(trace: Trace, result: int) -> Call | None:
    """Return the call of a norm that alone reads a sum, and to whose result a later unit adds, as in post-norm transformers."""
    for call in trace.calls:
        reads_all = call.first_input == result and all(call.start <= i < call.end for i in trace.consumers[result])
        if not (reads_all and is_norm_module(call.module) and call.output > result):
            continue
        values = _forward(trace, call.output, len(trace.nodes), lambda op: op in IDENTITIES)
        if any(trace.nodes[user].op in ADDITIONS for i in values for user in trace.consumers[i]):
            return call
    return None


def _read_running(trace: Trace, result: int, axes: Axes) -> Read:
    """Return a sum as one of the additions in the call of a module."""
    node = trace.nodes[result]
    call = trace.calls[node.stack[-1]]
    number = sum(other.op in ADDITIONS and other.stack == node.stack for other in trace.nodes[call.start : result])
    read = _read_at(trace, call, "sum", result, axes)
    return replace(read, number=number)


def _read(trace: Trace, call: Call, at: Literal["output", "input"], axes: Axes) -> Read:
    return _read_at(trace, call, at, call.output if at == "output" else call.first_input, axes)


def _read_at(trace: Trace, call: Call, at: Literal["output", "input", "sum"], index: int, axes: Axes) -> Read:
    node = trace.nodes[index] if index >= 0 else None
    layout: Layout = axes.layout or "unknown"
    if node is not None and len(node.shape) == len(axes.names) and _n_images(node, axes) != trace.nodes[0].shape[0]:
        layout = "unknown"  # windows or pixels of one image stand in the place of the batch
    has_map = node is None or layout != "unknown" or node.n_values > node.shape[0] * max(node.shape[1:], default=1)
    shows_grid = (
        node is None or "L" not in axes.names or _is_shown(trace, node.shape[axes.names.index("L")] - axes.n_prefix)
    )
    n_calls = trace.n_calls[call.module]
    return Read(call.module, at, layout, call.number, n_calls, axes.n_prefix, has_map, shows_grid=shows_grid)


def _n_images(node: Node, axes: Axes) -> int:
    """Return the length of the axis of images, by default the first one."""
    if not node.shape:
        return 0
    return node.shape[axes.names.index("B") if "B" in axes.names else 0]


def _is_shown(trace: Trace, n_positions: int) -> bool:
    """Whether one size of the maps of convolutions and pooling has this number of positions."""
    outputs = (call.output for call in trace.calls if isinstance(call.module, SPATIAL) and call.output >= 0)
    sizes = {trace.nodes[index].shape[2:] for index in outputs if len(trace.nodes[index].shape) == 4}
    return sum(h * w == n_positions for h, w in sizes) == 1


def _norm_output(trace: Trace, call: Call) -> Read:
    """Return the output of a norm; of one that holds its activation, the activation's input."""
    axes = trace.nodes[call.output].axes
    if axes.layout is None and call.first_input >= 0:
        axes = trace.nodes[call.first_input].axes
    activation = getattr(call.module, "act", None)
    for inner in trace.calls[call.index + 1 :]:
        if inner.parent == call.index and inner.module is activation:
            return _read(trace, inner, "input", axes)
    return _read(trace, call, "output", axes)


def _axes_at(trace: Trace, addition: Addition) -> Axes:
    """Return the axes of a sum: the stream may know them where the branch does not."""
    options = [trace.nodes[i].axes for i in (addition.stream, addition.result, addition.branch)]
    return next((axes for axes in options if axes.layout is not None), options[0])


def _entries(trace: Trace, addition: Addition) -> Iterator[int]:
    """Yield the first nodes of the branch behind functions that only rearrange the stream."""
    waiting, visited = [addition.source], set[int]()
    while waiting:
        for user in trace.consumers[waiting.pop()]:
            if user in addition.region and user not in visited:
                visited.add(user)
                if trace.nodes[user].op in IDENTITIES and not is_norm(trace, trace.nodes[user]):
                    waiting.append(user)
                else:
                    yield user


def _backward(trace: Trace, index: int) -> Iterator[tuple[int, bool]]:
    """Yield values of which a node is made without an offset, nearest first, and whether it is only rearranged."""
    same_values = True
    while (op := trace.nodes[index].op) in IDENTITIES or op in _SCALINGS:
        sources = [i for i in trace.nodes[index].inputs if trace.nodes[i].varying]
        if len(sources) != 1:
            return
        same_values = same_values and op in IDENTITIES
        index = sources[0]
        yield index, same_values


def _forward(trace: Trace, index: int, end: int, passes: Callable[[str], bool] | None = None) -> set[int]:
    """Return a value and those that activations, norms and rearrangements make of it alone before node ``end``."""
    reached, waiting = {index}, [index]
    while waiting:
        for user in trace.consumers[waiting.pop()]:
            node = trace.nodes[user]
            allowed = passes(node.op) if passes else _passes(trace, user)
            if user < end and allowed and user not in reached:
                reached.add(user)
                waiting.append(user)
    return reached


def _keeps_map(op: str) -> bool:
    """Whether a function rearranges a map or puts prefix tokens in front of it."""
    return op in IDENTITIES or op in ("cat", "concat")


def _passes(trace: Trace, index: int) -> bool:
    node = trace.nodes[index]
    return node.op in IDENTITIES or node.op.rstrip("_") in _ACTIVATIONS or is_norm(trace, node)


def _ancestors(trace: Trace, call: Call) -> Iterator[int]:
    while call.parent >= 0:
        yield call.parent
        call = trace.calls[call.parent]


def read_call(trace: Trace, call: Call, at: Literal["output", "input"] = "output") -> Read | None:
    """Return where the result, or the input, of a module between units is read."""
    index = call.output if at == "output" else call.first_input
    return _read(trace, call, at, trace.nodes[index].axes) if index >= 0 else None


def adds_branch(trace: Trace, block: nn.Module, unit: ResidualUnit, first_layer: nn.Module) -> bool:
    """Return whether a pass shows a unit as its block is described: the branch as it is read is added to a shortcut.

    Args:
        trace: The pass.
        block: The block that holds the unit.
        unit: The unit as the block is described.
        first_layer: First layer of the branch, on which the shortcut does not depend.
    """
    modules = [block, first_layer, *(read.module for read in (unit.branch_in, unit.branch_out) if read is not None)]
    calls = [[call for call in trace.calls if call.module is module] for module in modules]
    if len(calls) != 4 or any(len(module_calls) != 1 for module_calls in calls):
        return False
    around, layer, first, end = (module_calls[0] for module_calls in calls)
    stream = around.first_input
    if stream < 0 or stream not in _same_values(trace, first.first_input):
        return False
    sums = [
        node
        for node in trace.nodes[around.start : around.end]
        if node.op in ADDITIONS and not node.scales and any(end.output in _same_values(trace, i) for i in node.inputs)
    ]
    if len(sums) != 1 or len(sums[0].inputs) != 2 or around.output not in _forward(trace, sums[0].index, around.end):
        return False
    shortcuts = [i for i in sums[0].inputs if end.output not in _same_values(trace, i)]
    return len(shortcuts) == 1 and not trace.is_ancestor(layer.output, shortcuts[0])


def _same_values(trace: Trace, index: int) -> set[int]:
    """Return a value and those of which it is a rearrangement."""
    return {index, *(i for i, same_values in _backward(trace, index) if same_values)} if index >= 0 else set()
