"""Observe one forward pass: the order in which parameters and modules run, the parameters that reach a map, and attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.core.guard.parameter_use import parameter_owners
from vitscope.core.guard.trial_pass import UntraceableError, first_that_runs, observing, trial_images
from vitscope.models.structure.pointwise import PointwiseBranches
from vitscope.runtime.torch_internals import HigherOrderOperator

#: products of two tensors, which mix positions by what is in the image where both depend on it
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"})
#: attention as one call
FUSED_ATTENTION = frozenset({
    "scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
})  # fmt: skip
#: sums and concatenations, at which parallel branches meet
_MERGES = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "cat", "concat", "concatenate"})
_SUMS = _MERGES - {"cat", "concat", "concatenate"}
Stack = tuple[tuple[str, nn.Module], ...]

_REQUIRED = object()


@dataclass(frozen=True)
class AttentionCall:
    """Attention in the forward pass: one call, or a product of activations with a softmax or product of activations.

    Attributes:
        stack: The modules that were running, outermost first, with their names.
        time: Clock of the pass at the call.
        queries: Rows of its result; 1 for pooling by attention.
        fused: Whether it is one call of attention.
    """

    stack: Stack
    time: int
    queries: int
    fused: bool


@dataclass
class Execution:
    """One forward pass, with a clock that counts the calls of modules and functions.

    Attributes:
        first_use: Time of each parameter's first use by name; those that were not used are missing.
        starts: Time of each module's first call.
        ends: Time at which each module's last call ended.
        attention: Calls of attention in the pass.
        token_layers: (stack, time) of linear layers that were applied to several positions.
        pointwise: (stack, time) of 1x1 convolutions that end residual branches without any other kernel, see
            `vitscope.models.structure.pointwise`.
        reaching: Names of the parameters on which the output of any of the blocks depends.
        has_other_sums: Whether values of one shape that depend on the images are added outside of the blocks.
        splits_images: Whether a block takes parts of an image, such as windows, in the place of images.
    """

    first_use: dict[str, int] = field(default_factory=dict)
    starts: dict[nn.Module, int] = field(default_factory=dict)
    ends: dict[nn.Module, int] = field(default_factory=dict)
    attention: list[AttentionCall] = field(default_factory=list)
    token_layers: list[tuple[Stack, int]] = field(default_factory=list)
    pointwise: list[tuple[Stack, int]] = field(default_factory=list)
    reaching: set[str] = field(default_factory=set)
    has_other_sums: bool = False
    splits_images: bool = False


def execution(model: nn.Module, blocks: Collection[nn.Module], images: Tensor | None = None) -> Execution | None:
    """Run the model once in eval mode and return what was observed; None where it does not run.

    Weights, buffers, modes, gradients and random states are given back as they were.

    Args:
        model: The model, not compiled.
        blocks: The residual blocks; `Execution.reaching` is about their outputs, without any about the model's output.
        images: (B, C, H, W), of which the first is used; None for a random one of a size that the model states or takes.
    """

    def observe(x: Tensor) -> Execution:
        recorder = _Recorder(model, set(blocks))
        with observing(model), recorder.hooks():
            with recorder:
                output = model.forward(x)  # the hooks of the model itself belong to its user, who may count passes
            recorder.finish(output)
        return recorder.seen

    try:
        return first_that_runs(trial_images(model, images), observe)
    except UntraceableError:
        return None


class _Recorder(TorchFunctionMode):
    """Take note of each function's tensors: parameters, and what is made of parameters and constants alone."""

    def __init__(self, model: nn.Module, blocks: Collection[nn.Module]) -> None:
        super().__init__()
        self.model, self.blocks, self.seen = model, blocks, Execution()
        self.time = 0
        self.stack: list[tuple[str, nn.Module]] = []
        self.names = {id(p): name for name, p in model.named_parameters()}
        # tensors that do not depend on the image; they are held so that no id is used twice
        self.constant: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        # softmax and products of activations, and what is made of them without a layer: attention multiplies them again
        self.weights: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()
        self.branches = PointwiseBranches()
        # nodes of the graph at which blocks ended, with their times; the stream may be changed in place later
        self.block_ends: list[tuple[int, list[Any]]] = []
        self.merges: list[tuple[int, Any]] = []  # the same of sums and concatenations of maps

    def hooks(self) -> ExitStack:
        """Follow which modules run while the returned context is open."""
        stack = ExitStack()
        self._begin("", self.model)
        for name, module in self.model.named_modules():
            if module is self.model:
                continue
            before = module.register_forward_pre_hook(lambda module, args, name=name: self._begin(name, module))
            after = module.register_forward_hook(lambda module, args, output: self._end(module, output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def _begin(self, name: str, module: nn.Module) -> None:
        self.time += 1
        self.seen.starts.setdefault(module, self.time)
        self.stack.append((name, module))

    def _end(self, module: nn.Module, output: Any) -> None:
        self.time += 1
        self.seen.ends[module] = self.time
        self.stack.pop()
        if module in self.blocks:
            results = list(tensors(output))
            self.block_ends.append((self.time, [t.grad_fn for t in results]))
            self.seen.splits_images |= bool(results) and results[0].shape[:1] != (1,)  # one image was passed

    def finish(self, output: Any) -> None:
        """Find which parameters reach the last block's output, and what only the graph shows of their use."""
        ends = [t.grad_fn for t in tensors(output)]
        last, last_nodes = self.block_ends[-1] if self.block_ends else (0, [])
        # a map that is added to what the last block made, as in networks with parallel branches, belongs to the body too
        merged = [node for time, node in self.merges if time > last and _ancestors([node]) & set(last_nodes)]
        units = [node for _, nodes in self.block_ends for node in nodes]
        self.seen.reaching = _leaves([*units, *merged] if units else ends, self.names)
        owners = parameter_owners(self.model)
        for name in self.seen.reaching | _leaves(ends, self.names):
            if name not in self.seen.first_use and owners.get(name) in self.seen.starts:
                self.seen.first_use[name] = self.seen.starts[owners[name]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = list(tensors(result))
        arguments = list(tensors((args, tuple(kwargs.values()))))
        varying = [tensor for tensor in arguments if id(tensor) not in self.constant]
        if varying:
            written = args[:1] if getattr(func, "__name__", "") == "__setitem__" else results
            for tensor in (*written, *(getattr(tensor, "_base", None) for tensor in written)):
                self.constant.pop(id(tensor), None)  # a constant that values of the images were written to
        if not results:  # a shape or a type: nothing was computed
            return result
        self.time += 1
        for tensor in arguments:
            if id(tensor) in self.names:
                self.seen.first_use.setdefault(self.names[id(tensor)], self.time)
        if not varying:
            self.constant.update((id(tensor), tensor) for tensor in results)
        self._note(func, varying, arguments, results[0])
        if getattr(func, "__name__", "") in _SUMS and len(varying) == 2 and varying[0].shape == varying[1].shape:
            self.seen.has_other_sums |= not any(module in self.blocks for _, module in self.stack)
        if (end := self.branches.see(func, varying, arguments, results, tuple(self.stack))) is not None:
            self.seen.pointwise.append((end, self.time))
        if getattr(func, "__name__", "") in _MERGES and results[0].ndim == 4 and results[0][0, 0].numel() > 1:
            self.merges.append((self.time, results[0].grad_fn))
        return result

    def _note(self, func: Any, varying: list[Tensor], tensors: list[Tensor], result: Tensor) -> None:
        name = getattr(func, "__name__", "")
        fused = name in FUSED_ATTENTION
        is_product = name in _PRODUCTS and len(varying) > 1
        weighed = any(tensor in self.weights for tensor in varying)
        if fused or (is_product and weighed):
            queries = result.shape[-2] if result.ndim > 1 else 1
            self.seen.attention.append(AttentionCall(tuple(self.stack), self.time, int(queries), fused))
        elif is_product or (name == "softmax" and varying) or (weighed and not _has_weights(name)):
            self.weights[result] = True
        if func is F.linear and varying and tensors[0].ndim > 2 and tensors[0].shape[1:-1].numel() > 1:
            self.seen.token_layers.append((tuple(self.stack), self.time))


def _has_weights(name: str) -> bool:
    return name == "linear" or name.startswith("conv") or name.endswith("norm")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments or results: tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from tensors(entry)
    elif names := getattr(type(value), "__dataclass_fields__", None):
        yield from tensors(tuple(getattr(value, name, None) for name in names))


def is_foreign(func: Any) -> bool:
    """Whether a function is an operator that an extension has registered, of which nothing is known."""
    if isinstance(func, HigherOrderOperator):
        return True
    name = getattr(func, "_qualified_op_name", "") or getattr(func, "_name", "")
    if not isinstance(name, str) or "::" not in name:
        return False
    return name.split("::")[0] not in ("aten", "prim", "prims", "torchvision")


def function_name(func: Any) -> str:
    """Return the name of a function as it is called; of an attribute that is a tensor, such as ``x.mT``, the attribute's."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = _REQUIRED) -> Any:
    """Return an argument of a call by its position or its name.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        place: Position of the argument in the function's signature.
        name: Name of the argument.
        default: The value where the call does not give it.

    Raises:
        TypeError: The call does not give it and there is no default.
    """
    if len(args) > place:
        return args[place]
    value = kwargs.get(name, default)
    if value is _REQUIRED:
        raise TypeError(f"no argument {name}")
    return value


def _leaves(ends: Sequence[Any], names: dict[int, str]) -> set[str]:
    """Return the names of the parameters on which nodes of autograd's graph depend."""
    variables = (getattr(node, "variable", None) for node in _ancestors(ends))
    return {names[id(variable)] for variable in variables if variable is not None and id(variable) in names}


def _ancestors(ends: Sequence[Any]) -> set[Any]:
    """Return the nodes of autograd's graph on which ``ends`` depend, themselves included."""
    waiting = [node for node in ends if node is not None]
    visited = set(waiting)
    while waiting:
        for parent, _ in waiting.pop().next_functions:
            if parent is not None and parent not in visited:
                visited.add(parent)
                waiting.append(parent)
    return visited
