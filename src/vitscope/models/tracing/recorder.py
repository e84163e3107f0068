"""Record the graph of values of one small forward pass."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.guard.trial_pass import first_that_runs, observing, trial_images
from vitscope.models.structure.execution import FUSED_ATTENTION, function_name, is_foreign, tensors
from vitscope.models.tracing.additions import DIFFERENCES, STACKED_SUM
from vitscope.models.tracing.axes import Axes, unknown
from vitscope.models.tracing.graph import Call, Node, Trace
from vitscope.models.tracing.propagation import FunctionCall, contracted_axes, result_axes

#: a tensor plus a product of two others
_SUMS_WITH_PRODUCTS = frozenset({"baddbmm", "baddbmm_", "addbmm", "addbmm_", "addmm", "addmm_", "addmv", "addmv_"})
_MATRIX_PRODUCTS = frozenset({"matmul", "__matmul__", "linalg_matmul", "bmm", "mm"})
_PRODUCTS = _SUMS_WITH_PRODUCTS | {
    "matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "bmm", "mm", "mv", "einsum", "tensordot", "inner", "linear",
    "bilinear", "linalg_multi_dot", "chain_matmul", "linalg_vecdot",
}  # fmt: skip
#: functions that may return their argument itself
RETURNS_ARGUMENT = frozenset({
    "contiguous", "to", "float", "half", "double", "bfloat16", "type", "type_as", "cpu", "cuda", "dropout", "dropout2d",
    "alpha_dropout", "feature_alpha_dropout", "expand", "requires_grad_", "view_as", "detach_", "broadcast_tensors",
})  # fmt: skip
_REDUCTIONS = frozenset({"sum", "mean", "cumsum"})
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})


def trace(model: nn.Module, images: Tensor | None = None) -> Trace:
    """Run the model once in eval mode and return the graph of its values.

    Weights, buffers, modes, gradients and random states are given back as they were. A model on the meta device is traced
    without any arithmetic.

    Args:
        model: The model, also one on the meta device.
        images: (B, C, H, W), of which the first is used; None for a random one of a size that the model states or takes.

    Raises:
        UntraceableError: The model does not run on the images, or on images of any size that was tried.
    """
    model = unwrapped(model)

    def observe(x: Tensor) -> Trace:
        recorder = _Recorder(model, x)
        with observing(model), recorder.hooks():
            with recorder:
                output = model.forward(x)  # the hooks of the model itself belong to its user
            recorder.finish(output)
        return recorder.trace

    return first_that_runs(trial_images(model, images), observe)


class _Recorder(TorchFunctionMode):
    """Take note of each function and of the modules that run."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model, self.trace = model, Trace()
        self.names = {id(p): name for name, p in model.named_parameters()}
        # by tensor; an entry ends with its tensor, so that the activations of a pass are not kept
        self.node_of: MutableMapping[Tensor, int] = WeakIdKeyDictionary({images: 0})
        # nodes made of softmax or products of activations without a layer: whether there is a product among these
        self.weighed: dict[int, bool] = {}
        self.rooted = {0}  # nodes that depend on the images or on parameters
        self.running: list[int] = []
        self.counts: dict[nn.Module, int] = {}
        names = "BCHW" if images.ndim == 4 else "?" * images.ndim
        self.trace.nodes.append(Node(0, "images", (), (), tuple(images.shape), True, (0,), Axes(names)))
        self._begin("", model, (images,))

    def hooks(self) -> ExitStack:
        """Follow which modules run while the returned context is open."""
        stack = ExitStack()
        for name, module in self.model.named_modules():
            if module is self.model:
                continue
            before = module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self._begin(name, module, (args, kwargs)), with_kwargs=True
            )
            after = module.register_forward_hook(lambda module, args, output: self._end(output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def finish(self, output: Any) -> None:
        """Take note of the model's output."""
        self._end(output)

    def _begin(self, path: str, module: nn.Module, arguments: Any) -> None:
        parent = self.running[-1] if self.running else -1
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        call = Call(len(self.trace.calls), path, module, parent, len(self.trace.nodes), number)
        call.first_input = self._first_node(arguments)
        self.trace.calls.append(call)
        self.running.append(call.index)

    def _end(self, output: Any) -> None:
        call = self.trace.calls[self.running.pop()]
        call.end = len(self.trace.nodes)
        first = next(tensors(output), None)
        is_recorded = first is not None and self.node_of.get(first, -1) in self.rooted
        if first is not None and first.grad_fn is not None and not is_recorded:
            self._hidden(first, call)
        call.output = self._first_node(output)

    def _first_node(self, value: Any) -> int:
        return next((self.node_of[t] for t in tensors(value) if t in self.node_of), -1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op = function_name(func)
        results = [args[0]] if op == "__setitem__" else list(tensors(result))
        if results:
            self._note(op, args, kwargs, results, is_foreign(func))
        return result

    def _note(self, op: str, args: Any, kwargs: Any, results: list[Tensor], opaque: bool) -> None:
        """Add a node for each result of a function, and note on the first one what the function does."""
        arguments = list(tensors((args, tuple(kwargs.values()))))
        returns_argument = any(results[0] is t for t in arguments)
        if returns_argument and op in RETURNS_ARGUMENT and not _is_in_place(op):
            return
        parameters = [self.names[id(t)] for t in arguments if id(t) in self.names]
        values = [t for t in arguments if id(t) not in self.names]
        inputs = [i for i in map(self._source, values) if i >= 0]
        call = FunctionCall(op, args, kwargs, self._operands(values), results)
        varying = any(self.trace.nodes[i].varying for i in inputs)
        node = self._add(op, results, inputs, parameters, varying, _axes_of_results(call))[0]
        node.opaque = opaque
        node.scales = op.startswith(("addcmul", "lerp")) or kwargs.get("alpha", 1) != 1 or op in DIFFERENCES
        if op == "linear" or op.startswith("conv"):
            _note_layer(node, call)
        elif op in _REDUCTIONS and call.operands:
            self._note_reduction(node, call)
        elif op == "stack":
            node.dims = _stacked_dims(call)
        elif op in _MATRIX_PRODUCTS:
            node.axis = self._axis_of_product(args)
        self._note_attention(node, args)
        if returns_argument or _is_in_place(op):  # relu(x, inplace=True) returns its argument, too
            self._note_write(node, results[0])

    def _operands(self, values: Sequence[Tensor]) -> list[tuple[Tensor, Axes]]:
        """Return arguments that are no parameters with their axes, those that depend on the images first."""
        operands = []
        for tensor in values:
            source = self._source(tensor)
            is_known = source >= 0 and len(self.trace.nodes[source].shape) == tensor.ndim
            operands.append((tensor, self.trace.nodes[source].axes if is_known else unknown(tensor.ndim)))
        return sorted(operands, key=lambda operand: not self._is_varying(operand[0]))

    def _note_reduction(self, node: Node, call: FunctionCall) -> None:
        """Take note of the axes that a sum or mean removes; the sum over a stack of tensors is an addition of them."""
        x, axes = call.operands[0]
        node.dims = _reduced_dims(x.ndim, call)
        node.axis = "".join(axes.names[dim] for dim in node.dims)
        if node.op == "sum" and len(node.inputs) == 1:
            stack = self.trace.nodes[node.inputs[0]]
            if stack.op == "stack" and stack.dims == node.dims:
                node.op, node.inputs = STACKED_SUM, stack.inputs

    def _note_write(self, node: Node, result: Tensor) -> None:
        """Take note that the tensor of which a result is a view has new values where a function has changed the view."""
        base = getattr(result, "_base", None)
        if base is not None and base in self.node_of:
            before = self.trace.nodes[self.node_of[base]]
            self._add("write", (base,), [before.index, node.index], [], node.varying or before.varying, [before.axes])

    def _axis_of_product(self, args: Any) -> str:
        """Return the meaning of the axis over which a matrix product of activations with other values sums."""
        factors = list(tensors(args))[:2]  # (..., n, k) and (..., k, m)
        varying = [self._is_varying(factor) for factor in factors]
        if varying not in ([True, False], [False, True]):
            return "?"
        place = varying.index(True)
        names = self.trace.nodes[self._source(factors[place])].axes.names
        return (names[-1:] if place == 0 else names[-2:-1]) or "?"

    def _add(
        self, op: str, results: Any, inputs: list[int], parameters: list[str], varying: bool, axes: list[Axes]
    ) -> list[Node]:
        added = []
        for tensor, meaning in zip(results, axes):
            index = len(self.trace.nodes)
            node = Node(
                index, op, tuple(inputs), tuple(parameters), tuple(tensor.shape), varying, tuple(self.running), meaning
            )
            self.trace.nodes.append(node)
            if varying or parameters or any(i in self.rooted for i in inputs):
                self.rooted.add(index)
            self.node_of[tensor] = index
            added.append(node)
        return added

    def _source(self, tensor: Tensor) -> int:
        """Return the node of a tensor; one that no function of the pass made depends on what the running module was given."""
        index = self.node_of.get(tensor, -1)
        # one that was made of constants and has a gradient all the same, as the result of a torch.autograd.Function in NumPy
        is_made_elsewhere = index >= 0 and tensor.grad_fn is not None and index not in self.rooted
        if index >= 0 and not is_made_elsewhere:
            return index
        call = self.trace.calls[self.running[-1]] if self.running else None
        if tensor.grad_fn is not None and call is not None:
            return self._hidden(tensor, call)
        return -1

    def _hidden(self, tensor: Tensor, call: Call) -> int:
        """Return a node for a tensor that no function of the pass made.

        It is taken to depend on all values of the innermost running call that none has used yet, or on the call's input.
        """
        sources: list[int] = []
        while not sources:
            nodes = self.trace.nodes[call.start :]
            used = {i for node in nodes for i in node.inputs}
            sources = [node.index for node in nodes if node.varying and node.index not in used]
            if not sources and call.first_input >= 0:
                sources = [call.first_input]
            if call.parent < 0:
                break
            call = self.trace.calls[call.parent]
        node = self._add("function", (tensor,), sources, [], True, [unknown(tensor.ndim)])[0]
        node.opaque = True
        return node.index

    def _is_varying(self, tensor: Tensor) -> bool:
        source = self.node_of.get(tensor, -1)
        return source >= 0 and self.trace.nodes[source].varying

    def _note_attention(self, node: Node, args: Any) -> None:
        """Take note whether a function is attention, or makes weights for it.

        Attention is one call, or a product of values with weights: with a softmax or a product of activations, between which and
        the values no layer stands. Weights of a softmax alone that keep positions apart make a mixture, as of experts.
        """
        varying = [i for i in node.inputs if self.trace.nodes[i].varying]
        weights = [i for i in varying if i in self.weighed]
        holds_product = any(self.weighed[i] for i in weights)
        factors = self._factors(node.op, args) if node.op in _PRODUCTS else []
        is_product = len(factors) > 1
        is_softmax = node.op in ("softmax", "softmax_") and bool(varying)
        node.fused = node.op in FUSED_ATTENTION
        if node.fused or (is_product and weights):
            n_queries = node.shape[-2] if len(node.shape) > 1 else 1
            if node.fused or holds_product or not self._keeps_positions(node, args, factors):
                node.attention = n_queries
            else:
                node.mixture = n_queries
        elif is_product:
            self.weighed[node.index] = True
            node.unweighed_product = self._contracts_other_than_channels(node, args, factors)
        elif is_softmax or (weights and not self._mixes_channels(node, weights)):
            self.weighed[node.index] = holds_product
        node.weighed = node.index in self.weighed

    def _factors(self, op: str, args: Any) -> list[int]:
        """Return the nodes of the varying tensors that a function multiplies."""
        multiplied = args[1:] if op in _SUMS_WITH_PRODUCTS else args
        sources = [self._source(t) for t in tensors(multiplied) if id(t) not in self.names]
        return [i for i in sources if i >= 0 and self.trace.nodes[i].varying]

    def _contracted(self, op: str, args: Any, factors: list[int]) -> tuple[set[str], set[str]]:
        """Return the meanings of the axes that a product of two factors sums over, and of those that it keeps."""
        return contracted_axes(op, args, [self.trace.nodes[i].axes for i in factors])

    def _keeps_positions(self, node: Node, args: Any, factors: list[int]) -> bool:
        """Whether a product keeps the positions of its factors apart, as a mixture of experts does."""
        if len(factors) != 2:
            return False
        contracted, remaining = self._contracted(node.op, args, factors)
        return bool(remaining & set("LHW")) and not contracted & set("LHW")

    def _contracts_other_than_channels(self, node: Node, args: Any, factors: list[int]) -> bool:
        """Whether a product of activations sums over an axis that may be one of positions."""
        return len(factors) != 2 or "C" not in self._contracted(node.op, args, factors)[0]

    def _mixes_channels(self, node: Node, weights: list[int]) -> bool:
        """Whether a function of attention weights makes other values of them; heads may be mixed ("talking heads")."""
        mixes_heads = len(node.weight) > 1 and node.weight[0] == node.weight[1] and set(node.weight[2:]) <= {1}
        if node.op == "linear":
            return not mixes_heads or node.axis == "C"
        if node.op in _PRODUCTS:  # a product with a parameter
            return bool(node.parameters) and all(self.trace.nodes[i].shape != node.shape for i in weights)
        return (node.op.startswith("conv") and not mixes_heads) or node.op.endswith("norm")


def _is_in_place(op: str) -> bool:
    """Whether a function changes its first argument by its name alone."""
    return op in _IN_PLACE or (op.endswith("_") and not op.endswith("__"))


def _axes_of_results(call: FunctionCall) -> list[Axes]:
    """Return the axes of each result; unknown ones for arguments that the rules do not expect."""
    try:
        return result_axes(call)
    except (TypeError, ValueError, IndexError, RuntimeError):
        return [unknown(result.ndim) for result in call.results]


def _note_layer(node: Node, call: FunctionCall) -> None:
    """Take note of a layer's weight and of the axis that it mixes."""
    weight = call.argument(1, "weight")
    if isinstance(weight, Tensor):
        node.weight = tuple(weight.shape)
    if node.op == "linear" and call.operands:
        node.axis = call.operands[0][1].names[-1:] or "?"


def _stacked_dims(call: FunctionCall) -> tuple[int, ...]:
    """Return the axis along which tensors are stacked."""
    dim = call.argument(1, "dim", call.kwargs.get("axis", 0))
    return (dim % call.results[0].ndim,) if isinstance(dim, int) else ()


def _reduced_dims(n_axes: int, call: FunctionCall) -> tuple[int, ...]:
    """Return the axes that a reduction removes: all, where none are given."""
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list):
        return tuple(range(n_axes))
    return tuple(dim % n_axes for dim in dims if isinstance(dim, int) and -n_axes <= dim < n_axes)
