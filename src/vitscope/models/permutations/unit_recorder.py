"""Follow the axes of units through one forward pass: which axes of parameters must be permuted alike."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.models.permutations import axis_rules as rules
from vitscope.models.permutations.axis_rules import Axes, check_heads, fix_all, joined, plain
from vitscope.models.permutations.channel_labels import Label, cut_into_blocks, cut_into_heads, fix, merge
from vitscope.models.structure.execution import tensors
from vitscope.models.tracing.recorder import function_name
from vitscope.runtime.errors import StructureError

#: called with each observed tensor, the number of its axis of units and their label
Observer = Callable[[Tensor, int, Label], None]

_ELEMENTWISE = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "elu", "selu", "celu", "leaky_relu", "leaky_relu_",
    "softplus", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh", "hardtanh_", "sigmoid",
    "sigmoid_", "tanh", "tanh_", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "__neg__", "erf", "clamp",
    "clamp_", "clamp_min", "clamp_max", "nan_to_num", "reciprocal", "dropout", "dropout_", "dropout2d", "dropout1d",
    "feature_dropout", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "contiguous",
    "clone", "detach", "softmax", "log_softmax", "normalize", "requires_grad_", "zeros_like", "ones_like", "empty_like",
    "sin", "cos", "data", "prelu", "logsigmoid", "hardshrink", "softsign", "positive", "alpha_dropout",
})  # fmt: skip
_BINARY = frozenset({
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "mul", "mul_",
    "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__rtruediv__", "__itruediv__", "pow", "__pow__",
    "__rpow__", "maximum", "minimum", "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "eq", "ne",
    "lt", "gt", "le", "ge", "__eq__", "__ne__", "__lt__", "__gt__", "rsub", "multiply", "subtract", "true_divide",
})  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "prod", "vector_norm"})
_SPATIAL = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample", "pad", "roll", "flip",
})  # fmt: skip
_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"}
)
_PERMUTATIONS = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT"})
_PIECES = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"})
_JOINS = frozenset({"cat", "concat", "concatenate"})


class UnitRecorder(TorchFunctionMode):
    """Give the axes of all values labels, and merge the labels of axes that must be permuted alike.

    Args:
        model: The model that runs.
        images: Its input.
        observe: Called with the input and the output of each linear layer and convolution, and with queries and keys.
    """

    def __init__(self, model: nn.Module, images: Tensor, observe: Observer | None = None) -> None:
        super().__init__()
        self.model, self.observe = model, observe
        self.names = {id(p): name for name, p in (*model.named_parameters(), *model.named_buffers())}
        self.saved_names = set(model.state_dict(keep_vars=True))
        self.axes_of_name: dict[str, tuple[Label | None, ...]] = {}
        self.axes_of: MutableMapping[Tensor, Axes] = WeakIdKeyDictionary({images: (None,) * images.ndim})
        self.running: list[str] = []

    def hooks(self) -> ExitStack:
        """Follow which modules run while the returned context is open."""
        stack = ExitStack()
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            after = module.register_forward_hook(lambda *_: self.running.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def finish(self, output: Any) -> None:
        """Leave the axes of the model's output in place."""
        for tensor in tensors(output):
            fix_all(self._axes(tensor), "the model's output")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = function_name(func)
        if op == "multi_head_attention_forward":
            kwargs = {**kwargs, "need_weights": kwargs.get("need_weights", True)}
        result = func(*args, **kwargs)
        results = list(tensors(result))
        if results or op == "__setitem__":
            self._note(op, args, kwargs, result, results)
        return result

    def _note(self, op: str, args: Any, kwargs: Any, result: Any, results: list[Tensor]) -> None:
        operands = list(tensors((args, tuple(kwargs.values()))))
        labeled = [t for t in operands if any(self._axes(t))]
        if not labeled:
            for t in results:
                self.axes_of[t] = (None,) * t.ndim
            return
        try:
            axes = self._result_axes(op, args, kwargs, operands, results)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise self._refusal(op) from error
        if axes is None:
            if any(not label.root.fixed for t in labeled for label in plain(self._axes(t)) if label is not None):
                raise self._refusal(op)
            axes = [(None,) * t.ndim for t in results]
        for t, tensor_axes in zip(results, axes):
            self.axes_of[t] = tensor_axes if len(tensor_axes) == t.ndim else self._lost(op, tensor_axes, t)
        for t in (*operands, *results):
            check_heads(self._axes(t), self._place(op))

    def _lost(self, op: str, axes: Axes, result: Tensor) -> Axes:
        fix_all(axes, self._place(op))
        return (None,) * result.ndim

    def _refusal(self, op: str) -> StructureError:
        fix_text = "use alignment=none, or write that part with layers and functions that can be followed"
        return StructureError(
            type(self.model).__name__, f"its units cannot be followed through {self._place(op)}", fix_text
        )

    def _place(self, op: str) -> str:
        return f"{op} in {self.running[-1] or 'the model itself'}" if self.running else op

    def _axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a value, a parameter or a constant."""
        if id(tensor) in self.names:
            return self.named_axes(self.names[id(tensor)], tensor)
        if tensor in self.axes_of:
            return self.axes_of[tensor]
        if tensor.grad_fn is not None:
            raise self._refusal("a function of its own")
        return (None,) * tensor.ndim

    def named_axes(self, name: str, tensor: Tensor) -> tuple[Label | None, ...]:
        """Return the labels of the axes of a parameter or buffer."""
        if name not in self.axes_of_name:
            fixed = "" if name in self.saved_names else f"{name} is not in the state dict"
            many = tensor.ndim > 1
            self.axes_of_name[name] = tuple(
                Label(size, f"{name}, axis {k}" if many else name, fixed) if size > 1 else None
                for k, size in enumerate(tensor.shape)
            )
        return self.axes_of_name[name]

    def _result_axes(
        self, op: str, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor]
    ) -> Sequence[Axes] | None:
        """Return the axes of each result, or None for a function that is not known."""
        x, place_name = operands[0], self._place(op)
        axes = self._axes(x)
        if op == "linear" or op.startswith("conv"):
            return [self._layer(op, args, kwargs, results[0], place_name)]
        if op == "scaled_dot_product_attention":
            return [self._attention(args, kwargs, place_name)]
        if op == "multi_head_attention_forward":
            return self._multi_head_attention(args, kwargs, results)
        if op.endswith("norm") and op not in _REDUCTIONS:
            return self._norm(op, args, kwargs, axes, place_name)
        if op in _ELEMENTWISE and op != "prelu":
            return [plain(axes) if op in ("softmax", "log_softmax", "normalize") else axes] * len(results)
        if op in _BINARY or op == "prelu":
            return [self._elements(op, operands, results[0], place_name)]
        if op in _PRODUCTS:
            first, second = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
            pair = (second, first) if op == "__rmatmul__" else (first, second)
            return [self._product(*pair, place_name)]
        if op == "einsum":
            return [self._einsum(args, place_name)]
        if op in _JOINS or op == "stack":
            return [self._join(op, args, kwargs, results[0], place_name)]
        if op in _RESHAPES:
            return [rules.reshaped(axes, x.shape, results[0].shape, place_name)]
        if op in _PERMUTATIONS:
            order = _order(op, args, kwargs, x.ndim)
            return [tuple(axes[k] for k in order)]
        if op in _PIECES or op in ("unbind", "select", "narrow"):
            return self._pieces(op, args, kwargs, axes, results, place_name)
        if op == "__getitem__":
            return [rules.indexed(axes, args[1], place_name)]
        if op in _REDUCTIONS or op in ("max", "min", "argmax", "argmin"):
            return [self._reduced(args, kwargs, axes, t, x) for t in results]
        if op in _SPATIAL or op in ("expand", "expand_as", "repeat", "broadcast_to", "repeat_interleave"):
            return [self._resized(op, args, kwargs, axes, t, place_name) for t in results]
        return None

    def _layer(self, op: str, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        x, weight, bias = (_argument(args, kwargs, k, name) for k, name in enumerate(("input", "weight", "bias")))
        place = -1 if op == "linear" else 1 - weight.ndim  # of the channels, for images without a batch too
        groups = 1 if op == "linear" else _argument(args, kwargs, 8 if "transpose" in op else 6, "groups", 1)
        if "transpose" in op:
            groups = _argument(args, kwargs, 6, "groups", 1)
        axes, kernel = plain(self._axes(x)), plain(self._axes(weight))
        place %= x.ndim
        label, (out, into) = axes[place], kernel[:2] if "transpose" not in op else kernel[1::-1]
        if groups == 1:
            if x.shape[place] > 1:
                label = joined(label, into, f"{place_name} reads channels that are no units")
        elif (
            groups
            == x.shape[place]
            == (weight.shape[0] if "transpose" not in op else weight.shape[0] * weight.shape[1])
        ):
            out = label = joined(label, kernel[0], f"{place_name} reads channels that are no units")
        else:
            reason = f"{place_name} has groups of channels"
            for one in (label, into, out):
                if one is not None:
                    fix(one, reason)
        if bias is not None and out is not None:
            out = joined(out, plain(self._axes(bias))[0], place_name)
        for k in kernel[2:]:  # places of the kernel
            if k is not None:
                fix(k, "these are places of a kernel")
        if self.observe is not None and label is not None:
            self.observe(x, place, label)
        if self.observe is not None and out is not None:
            self.observe(result, place, out)
        rest = [None if op != "linear" else axis for axis in axes]
        rest[place] = out
        return tuple(rest)

    def _norm(self, op: str, args: Any, kwargs: Any, axes: Axes, place_name: str) -> Sequence[Axes] | None:
        result = list(plain(axes))
        if op in ("layer_norm", "rms_norm"):
            n = len(_argument(args, kwargs, 1, "normalized_shape"))
            places = range(len(result) - n, len(result))
            scales = args[2:4] if len(args) > 2 else (kwargs.get("weight"), kwargs.get("bias"))
        elif op in ("batch_norm", "instance_norm", "group_norm"):
            places = range(1, 2)
            if op == "group_norm" and _argument(args, kwargs, 1, "num_groups") > 1 and result[1] is not None:
                fix(result[1], f"{place_name} has groups of channels")
            scales = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor)]
        else:
            return None
        for scale in scales:
            if isinstance(scale, Tensor):
                for k, tensor_axes in zip(places, plain(self._axes(scale))):
                    result[k] = joined(result[k], tensor_axes, place_name)
        return [tuple(result)]

    def _elements(self, op: str, operands: list[Tensor], result: Tensor, place_name: str) -> Axes:
        if op == "prelu":
            x, weight = operands[:2]
            axes = list(plain(self._axes(x)))
            if weight.numel() > 1:
                axes[1] = joined(axes[1], plain(self._axes(weight))[0], place_name)
            return tuple(axes)
        return rules.broadcast([(self._axes(t), t.shape) for t in operands], result.shape, place_name)

    def _attention(self, args: Any, kwargs: Any, place_name: str) -> Axes:
        query, key, value = (_argument(args, kwargs, k, name) for k, name in enumerate(("query", "key", "value")))
        mask = _argument(args, kwargs, 3, "attn_mask", None)
        for tensor in (query, key) if self.observe is not None else ():
            self._observe_heads(tensor)
        scores = [*self._batch_axes([query, key], place_name), None, None]
        joined(plain(self._axes(query))[-1], plain(self._axes(key))[-1], place_name)
        if mask is not None:
            sizes = [*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2]]
            scores = list(rules.broadcast([(tuple(scores), sizes), (self._axes(mask), mask.shape)], sizes, place_name))
        values = plain(self._axes(value))
        batch = [joined(a, b, place_name) for a, b in zip(plain(tuple(scores))[:-2], values[:-2])]
        return (*batch, plain(self._axes(query))[-2], values[-1])

    def _observe_heads(self, tensor: Tensor) -> None:
        """Observe queries or keys (..., heads, tokens, channels) as one axis of units."""
        axes = plain(self._axes(tensor))
        heads, channels = (axes[-3], axes[-1]) if tensor.ndim > 3 else (None, None)
        if self.observe is not None and heads is not None and channels is not None:
            label = Label(heads.size * channels.size, "queries and keys", heads=(heads, channels))
            with torch.no_grad(), torch._C.DisableTorchFunction():
                flat = tensor.detach().transpose(-3, -2).flatten(-2)  # (..., tokens, heads * channels)
            self.observe(flat, flat.ndim - 1, label)

    def _multi_head_attention(self, args: Any, kwargs: Any, results: list[Tensor]) -> Sequence[Axes] | None:
        names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
                 "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
        call_arguments = {**dict(zip(names, args)), **kwargs}
        if (
            call_arguments["bias_k"] is not None
            or call_arguments["bias_v"] is not None
            or call_arguments.get("use_separate_proj_weight")
        ):
            return None
        place_name, weight, bias = (
            self._place("multi_head_attention_forward"),
            call_arguments["in_proj_weight"],
            call_arguments["in_proj_bias"],
        )
        rows, columns = plain(self._axes(weight))
        for name in ("query", "key", "value"):
            joined(plain(self._axes(call_arguments[name]))[-1], columns, place_name)
        if bias is not None and rows is not None:
            rows = joined(rows, plain(self._axes(bias))[0], place_name)
        out, out_in = plain(self._axes(call_arguments["out_proj_weight"]))
        assert rows is not None
        assert out_in is not None
        parts = [
            cut_into_heads(block, call_arguments["num_heads"]) for block in cut_into_blocks(rows, (rows.size // 3,) * 3)
        ]
        for heads, _ in parts[1:]:
            merge(parts[0][0], heads)
        merge(parts[0][1], parts[1][1])
        values = Label(out_in.size, place_name)
        values.heads = parts[2]
        merge(out_in, values)
        if call_arguments["out_proj_bias"] is not None and out is not None:
            out = joined(out, plain(self._axes(call_arguments["out_proj_bias"]))[0], place_name)
        if self.observe is not None:
            if columns is not None:
                self.observe(call_arguments["query"], call_arguments["query"].ndim - 1, columns)
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self.observe(F.linear(call_arguments["query"], weight, bias), call_arguments["query"].ndim - 1, rows)
        return [(None, None, out), *((None,) * t.ndim for t in results[1:])]

    def _product(self, a: Tensor, b: Tensor, place_name: str) -> Axes:
        first, second = plain(self._axes(a)), plain(self._axes(b))
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError("product with a vector")
        joined(first[-1], second[-2], place_name)
        return (*self._batch_axes([a, b], place_name), first[-2], second[-1])

    def _batch_axes(self, operands: Sequence[Tensor], place_name: str) -> Axes:
        shape = torch.broadcast_shapes(*(t.shape[:-2] for t in operands))
        return rules.broadcast([(plain(self._axes(t))[:-2], t.shape[:-2]) for t in operands], shape, place_name)

    def _einsum(self, args: Any, place_name: str) -> Axes:
        inputs, _, output = args[0].replace(" ", "").partition("->")
        operands = list(tensors(args[1:]))
        label_of: dict[str, Label | None] = {}
        for letters, operand in zip(inputs.split(","), operands, strict=True):
            for letter, axis in zip(letters, plain(self._axes(operand)), strict=True):
                label_of[letter] = joined(label_of[letter], axis, place_name) if letter in label_of else axis
        return tuple(label_of[letter] for letter in output)

    def _join(self, op: str, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        parts = list(tensors(_argument(args, kwargs, 0, "tensors")))
        dim = _argument(args, kwargs, 1, "dim", 0) % result.ndim
        if op == "stack":
            axes = [plain(self._axes(t)) for t in parts]
            merged = rules.broadcast([(a, t.shape) for a, t in zip(axes, parts)], parts[0].shape, place_name)
            return (*merged[:dim], None, *merged[dim:])
        along = [plain(self._axes(t))[dim] for t in parts]
        others = [(tuple(None if k == dim else axis for k, axis in enumerate(plain(self._axes(t)))),
                   [1 if k == dim else size for k, size in enumerate(t.shape)]) for t in parts]  # fmt: skip
        merged = rules.broadcast(others, others[0][1], place_name)
        labels = [label for label in along if label is not None]
        label = None
        if labels and len(labels) == len(parts):
            label = Label(result.shape[dim], f"channels joined by {place_name}", blocks=tuple(labels))
        else:
            for one in labels:
                fix(one, f"{place_name} joins it with places that have a meaning")
        return (*merged[:dim], label, *merged[dim + 1 :])

    def _pieces(
        self, op: str, args: Any, kwargs: Any, axes: Axes, results: list[Tensor], place_name: str
    ) -> Sequence[Axes]:
        dim = _argument(args, kwargs, 1 if op in ("unbind", "select", "narrow") else 2, "dim", 0) % len(axes)
        if op == "unbind":
            return [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
        if op == "select":
            return [rules.selected(axes, dim, _argument(args, kwargs, 2, "index"), place_name)]
        axis = axes[dim]
        if op != "narrow" and isinstance(axis, Label):
            blocks = cut_into_blocks(axis, tuple(t.shape[dim] for t in results))
            return [(*axes[:dim], block, *axes[dim + 1 :]) for block in blocks]
        if isinstance(axis, rules.Stacked) and axis.is_index and len(results) == len(axis.labels):
            parts = [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
            return [(*part[:dim], None, *part[dim:]) for part in parts]
        if axis is not None:
            fix_all((axis,), f"{place_name} takes a part of its channels")
        return [(*axes[:dim], None, *axes[dim + 1 :]) for _ in results]

    def _reduced(self, args: Any, kwargs: Any, axes: Axes, result: Tensor, x: Tensor) -> Axes:
        tensor_axes = plain(axes)
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        if dims is None or isinstance(dims, Tensor | float):
            return (None,) * result.ndim
        places = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if result.ndim == x.ndim:
            return tuple(None if k in places else axis for k, axis in enumerate(tensor_axes))
        return tuple(axis for k, axis in enumerate(tensor_axes) if k not in places)

    def _resized(self, op: str, args: Any, kwargs: Any, axes: Axes, result: Tensor, place_name: str) -> Axes:
        x = args[0]
        added = result.ndim - x.ndim
        dims = _argument(args, kwargs, 2 if op in ("roll", "repeat_interleave") else 1, "dims", kwargs.get("dim", ()))
        dims = (dims,) if isinstance(dims, int) else dims
        reordered = {d % x.ndim + added for d in dims} if op in ("roll", "flip", "repeat_interleave") else set()
        remaining: list[Label | None] = [None] * added
        for k, axis in enumerate(plain(axes), start=added):
            if axis is not None and (x.shape[k - added] != result.shape[k] or k in reordered):
                fix(axis, f"{place_name} moves or repeats its channels")
                axis = None
            remaining.append(axis)
        return tuple(remaining)


_MISSING = object()


def _argument(args: Sequence[Any], kwargs: Any, place: int, name: str, default: Any = _MISSING) -> Any:
    if len(args) > place:
        return args[place]
    value = kwargs.get(name, default)
    if value is _MISSING:
        if name == "bias":
            return None
        raise TypeError(f"no argument {name}")
    return value


def _order(op: str, args: Sequence[Any], kwargs: Any, n_axes: int) -> list[int]:
    order = list(range(n_axes))
    if op in ("t", "T"):
        return order[::-1]
    if op == "mT":
        return [*order[:-2], order[-1], order[-2]]
    if op == "permute":
        dims = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:] or kwargs["dims"]
        return [int(d) % n_axes for d in dims]
    names = {"transpose": ("dim0", "dim1"), "movedim": ("source", "destination"), "moveaxis": ("source", "destination")}
    first, second = (
        _argument(args, kwargs, k + 1, n) % n_axes for k, n in enumerate(names.get(op, ("axis0", "axis1")))
    )
    if op in ("movedim", "moveaxis"):
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = second, first
    return order
