"""Functions of torch by what they do to the axes of their operands, and the arguments of a call of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: functions of single elements of one tensor: every axis stays what it is
ELEMENTWISE = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "elu", "selu", "celu", "leaky_relu", "leaky_relu_",
    "softplus", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh", "hardtanh_", "sigmoid",
    "sigmoid_", "tanh", "tanh_", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "__neg__", "erf", "clamp",
    "clamp_", "clamp_min", "clamp_max", "nan_to_num", "reciprocal", "dropout", "dropout_", "dropout2d", "dropout1d",
    "feature_dropout", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "contiguous",
    "clone", "detach", "softmax", "log_softmax", "normalize", "requires_grad_", "zeros_like", "ones_like", "empty_like",
    "sin", "cos", "data", "prelu", "logsigmoid", "hardshrink", "softsign", "positive", "alpha_dropout",
})  # fmt: skip
#: functions of the elements of several tensors, which broadcast to one shape
BINARY = frozenset({
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "mul", "mul_",
    "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__rtruediv__", "__itruediv__", "pow", "__pow__",
    "__rpow__", "maximum", "minimum", "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "eq", "ne",
    "lt", "gt", "le", "ge", "__eq__", "__ne__", "__lt__", "__gt__", "rsub", "multiply", "subtract", "true_divide",
})  # fmt: skip
#: sums, means and norms over some axes
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "prod", "vector_norm"})
#: functions that resize or reorder axes of positions
SPATIAL = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample", "pad", "roll", "flip",
})  # fmt: skip
#: functions that keep the order of the entries and change the shape
RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"}
)
#: functions that change the order of the axes
PERMUTATIONS = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT"})
#: functions that cut a tensor along one axis
PIECES = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})
#: products of matrices
PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"})
#: functions that join tensors along one axis
JOINS = frozenset({"cat", "concat", "concatenate"})

_MISSING = object()


def argument(args: Sequence[Any], kwargs: Any, place: int, name: str, default: Any = _MISSING) -> Any:
    """Return an argument of a call by its position or its name; a missing ``bias`` is None.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        place: Position of the argument in the function's signature.
        name: Name of the argument.
        default: Value where the call does not give it.

    Raises:
        TypeError: The call does not give it and there is no default.
    """
    if len(args) > place:
        return args[place]
    value = kwargs.get(name, default)
    if value is _MISSING:
        if name == "bias":
            return None
        raise TypeError(f"no argument {name}")
    return value


def axis_order(op: str, args: Sequence[Any], kwargs: Any, n_axes: int) -> list[int]:
    """Return which axis of the operand each axis of the result is, for a function of `PERMUTATIONS`.

    Args:
        op: Name of the function.
        args: Positional arguments of the call, the operand first.
        kwargs: Keyword arguments of the call.
        n_axes: Number of axes of the operand.
    """
    order = list(range(n_axes))
    if op in ("t", "T"):
        return order[::-1]
    if op == "mT":
        return [*order[:-2], order[-1], order[-2]]
    if op == "permute":
        dims = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:] or kwargs["dims"]
        return [int(d) % n_axes for d in dims]
    names = {"transpose": ("dim0", "dim1"), "movedim": ("source", "destination"), "moveaxis": ("source", "destination")}
    first, second = (argument(args, kwargs, k + 1, n) % n_axes for k, n in enumerate(names.get(op, ("axis0", "axis1"))))
    if op in ("movedim", "moveaxis"):
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = second, first
    return order
