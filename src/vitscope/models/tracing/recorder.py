"""Record the graph of values of one small forward pass."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.guard.trial_pass import first_that_runs, observing, trial_images
from vitscope.models.structure.execution import tensors
from vitscope.models.tracing.additions import DIFFERENCES, STACKED_SUM
from vitscope.models.tracing.axes import Axes, unknown
from vitscope.models.tracing.graph import Call, Node, Trace
from vitscope.models.tracing.propagation import einsum_terms, result_axes
from vitscope.runtime.torch_internals import HigherOrderOperator

#: attention as one call
FUSED_ATTENTION = frozenset({
    "scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
})  # fmt: skip
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
        # softmax and products of activations, and what is made of them without a layer; whether there is a product among them
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
        if (
            first is not None
            and first.grad_fn is not None
            and (first not in self.node_of or self.node_of[first] not in self.rooted)
        ):
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
        arguments = list(tensors((args, tuple(kwargs.values()))))
        changes_in_place = op in _IN_PLACE or (op.endswith("_") and not op.endswith("__"))
        if any(results[0] is t for t in arguments) and not changes_in_place:
            if op in RETURNS_ARGUMENT:
                return
            changes_in_place = True  # relu(x, inplace=True)
        parameters = [self.names[id(t)] for t in arguments if id(t) in self.names]
        values = [t for t in arguments if id(t) not in self.names]
        sources = [self._source(t) for t in values]
        nodes = self.trace.nodes
        operands = [
            (t, nodes[s].axes if s >= 0 and len(nodes[s].shape) == t.ndim else unknown(t.ndim))
            for t, s in zip(values, sources)
        ]
        operands.sort(key=lambda pair: not (self._is_varying(pair[0])))
        inputs = [s for s in sources if s >= 0]
        varying = any(nodes[s].varying for s in inputs)
        try:
            axes = result_axes(op, args, kwargs, operands, results)
        except (TypeError, ValueError, IndexError, RuntimeError):
            axes = [unknown(r.ndim) for r in results]
        added = self._add(op, results, inputs, parameters, varying, axes)
        added[0].opaque = opaque
        added[0].scales = op.startswith(("addcmul", "lerp")) or kwargs.get("alpha", 1) != 1 or op in DIFFERENCES
        if op == "linear" or op.startswith("conv"):
            self._note_layer(added[0], args, kwargs, operands)
        elif op in ("sum", "mean", "cumsum") and operands:
            added[0].dims = _reduced_dims(operands[0][0].ndim, args, kwargs)
            added[0].axis = "".join(operands[0][1].names[d] for d in added[0].dims)
            stack = nodes[inputs[0]] if len(inputs) == 1 else None
            if op == "sum" and stack is not None and stack.op == "stack" and added[0].dims == stack.dims:
                added[0].op, added[0].inputs = STACKED_SUM, stack.inputs
        elif op == "stack":
            added[0].dims = _stacked_dims(results[0].ndim, args, kwargs)
        elif op in _MATRIX_PRODUCTS:
            added[0].axis = self._axis_of_product(args)
        self._note_attention(added[0], args, inputs)
        if changes_in_place and (base := getattr(results[0], "_base", None)) is not None and base in self.node_of:
            before = self.node_of[base]
            self._add(
                "write", (base,), [before, added[0].index], [], varying or nodes[before].varying, [nodes[before].axes]
            )

    def _axis_of_product(self, args: Any) -> str:
        """Return the meaning of the axis over which a matrix product of activations with other values sums."""
        factors = list(tensors(args))[:2]
        if len(factors) < 2 or self._is_varying(factors[0]) == self._is_varying(factors[1]):
            return "?"
        first = self._is_varying(factors[0])
        names = self.trace.nodes[self._source(factors[0 if first else 1])].axes.names
        return (names[-1:] if first else names[-2:-1]) or "?"

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

    def _note_layer(self, node: Node, args: Any, kwargs: Any, operands: list[tuple[Tensor, Axes]]) -> None:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if isinstance(weight, Tensor):
            node.weight = tuple(weight.shape)
        if node.op == "linear" and operands:
            axes = operands[0][1]
            node.axis = axes.names[-1] if axes.names else "?"
        groups = args[6] if len(args) > 6 and not node.op.startswith("conv_transpose") else kwargs.get("groups", 1)
        node.groups = groups if isinstance(groups, int) else 1

    def _note_attention(self, node: Node, args: Any, inputs: list[int]) -> None:
        nodes = self.trace.nodes
        varying = [i for i in inputs if nodes[i].varying]
        factors = self._factors(node.op, args) if node.op in _PRODUCTS else []
        is_product = len(factors) > 1
        weights = [i for i in varying if i in self.weighed]
        if node.op in FUSED_ATTENTION or (is_product and weights):
            queries = int(node.shape[-2]) if len(node.shape) > 1 else 1
            node.fused = node.op in FUSED_ATTENTION
            if node.fused or any(self.weighed[i] for i in weights) or not self._keeps_positions(node, args, factors):
                node.attention = queries
            else:
                node.mixture = queries
        elif is_product:
            self.weighed[node.index] = True
            node.unweighed_product = self._contracts_other_than_channels(node, args, factors)
        elif node.op in ("softmax", "softmax_") and varying:
            self.weighed[node.index] = any(self.weighed.get(i, False) for i in varying)
        elif weights and not self._mixes_channels(node, weights):
            self.weighed[node.index] = any(self.weighed[i] for i in weights)
        node.weighed = node.index in self.weighed

    def _factors(self, op: str, args: Any) -> list[int]:
        """Return the nodes of the varying tensors that a function multiplies."""
        multiplied = args[1:] if op in _SUMS_WITH_PRODUCTS else args
        sources = [self._source(t) for t in tensors(multiplied) if id(t) not in self.names]
        return [i for i in sources if i >= 0 and self.trace.nodes[i].varying]

    def _contracted(self, op: str, args: Any, factors: list[int]) -> tuple[set[str], set[str]]:
        """Return the meaning of the axes that a product of two factors sums over, and of those that it keeps."""
        first, second = (self.trace.nodes[i].axes.names for i in factors[:2])
        if op == "einsum":
            terms = einsum_terms(args)
            if terms is None or len(terms[0]) != len(factors):
                return {"?"}, set()
            meaning: dict[str, set[str]] = {}
            for letters, index in zip(terms[0], factors):
                for letter, name in zip(letters, self.trace.nodes[index].axes.names):
                    meaning.setdefault(letter, set()).add(name)
            summed = set().union(*(names for letter, names in meaning.items() if letter not in terms[1]))
            shared = set().union(*(meaning.get(letter, set()) for letter in terms[1]))
            return summed, shared
        if op in (
            "tensordot",
            "inner",
            "linear",
            "bilinear",
            "linalg_vecdot",
            "linalg_multi_dot",
            "chain_matmul",
            "mv",
        ):
            return {"?"}, set()
        rows = second[-2:-1] or "?"
        return {first[-1:] or "?", rows}, set(first[:-2]) & set(second[:-2])

    def _keeps_positions(self, node: Node, args: Any, factors: list[int]) -> bool:
        """Whether a product keeps the positions of its factors apart, as a mixture of experts does."""
        if len(factors) != 2:
            return False
        summed, shared = self._contracted(node.op, args, factors)
        return bool(shared & set("LHW")) and not summed & set("LHW")

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


def is_foreign(func: Any) -> bool:
    """Whether a function is an operator that an extension has registered, of which nothing is known."""
    if isinstance(func, HigherOrderOperator):
        return True
    name = getattr(func, "_qualified_op_name", "") or getattr(func, "_name", "")
    return (
        isinstance(name, str) and "::" in name and name.split("::")[0] not in ("aten", "prim", "prims", "torchvision")
    )


def function_name(func: Any) -> str:
    """Return the name of a function as it is called; of an attribute that is a tensor, such as ``x.mT``, the attribute's."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _stacked_dims(n_axes: int, args: Any, kwargs: Any) -> tuple[int, ...]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return (dim % n_axes,) if isinstance(dim, int) else ()


def _reduced_dims(n_axes: int, args: Any, kwargs: Any) -> tuple[int, ...]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list):
        return tuple(range(n_axes))
    return tuple(d % n_axes for d in dims if isinstance(d, int) and -n_axes <= d < n_axes)
