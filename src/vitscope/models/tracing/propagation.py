"""Axes of a function's result, from those of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitscope.models.tracing import axes as ax
from vitscope.models.tracing.axes import Axes

#: functions of maps (B, C, H, W) or sequences (B, C, L), by a word of their names
_CHANNELS_FIRST = (
    "conv",
    "pool",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "interpolate",
    "upsample",
    "pixel_",
    "grid_sample",
)
_CHANNELS_LAST = ("layer_norm", "rms_norm")
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"})
_PERMUTATIONS = frozenset(
    {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "mH"}
)
_PIECES = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})
#: functions after which positions may stand in another order
_REORDERINGS = frozenset({
    "gather", "take_along_dim", "sort", "argsort", "topk", "index_select", "scatter", "scatter_", "index_put", "index_put_",
    "masked_select", "flip",
})  # fmt: skip
_JOINS = frozenset({"cat", "concat", "concatenate"})
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "max", "min"})


def result_axes(
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operands: Sequence[tuple[Tensor, Axes]],
    results: Sequence[Tensor],
) -> list[Axes]:
    """Return the axes of each tensor that a function returned.

    Args:
        op: The function's name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        operands: Its tensor arguments that are no parameters, with their axes.
        results: Tensors that it returned.
    """
    if not operands:
        return [ax.unknown(r.ndim) for r in results]
    x, axes = operands[0]
    if op in _PIECES:
        dim = _argument(args, kwargs, 2, "dim", 0)
        return ax.pieces(axes, [r.shape for r in results], dim) if isinstance(dim, int) else [axes for _ in results]
    result = results[0]
    if op in _JOINS:
        dim = _argument(args, kwargs, 1, "dim", 0)
        first = args[0] if args else kwargs.get("tensors", ())
        axes_of = {id(t): a for t, a in operands}
        parts = [(axes_of.get(id(t), ax.unknown(t.ndim)), t.shape) for t in first]
        return [ax.joined(parts, dim)]
    if op == "stack":
        dim = _argument(args, kwargs, 1, "dim", 0) % result.ndim
        return [Axes(axes.names[:dim] + "?" + axes.names[dim:], axes.grid, axes.n_prefix)]
    if op == "einsum":
        return [_einsum_axes(args, operands, result)]
    single = _single(op, args, kwargs, x, axes, operands, result)
    return [single if len(single.names) == r.ndim else ax.unknown(r.ndim) for r in results]


def _single(
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    x: Tensor,
    axes: Axes,
    operands: Sequence[tuple[Tensor, Axes]],
    result: Tensor,
) -> Axes:
    if op in _REORDERINGS:
        return ax.unknown(result.ndim)
    if op in _RESHAPES:
        return ax.reshaped(axes, x.shape, result.shape)
    if op in _PERMUTATIONS:
        order = _order(op, args, kwargs, x.ndim)
        return ax.permuted(axes, order) if order is not None else ax.unknown(result.ndim)
    if op == "__getitem__":
        return ax.indexed(axes, x.shape, args[1])
    if op in ("unsqueeze", "squeeze", "expand", "select", "unbind", "narrow"):
        return _resized(op, args, kwargs, x, axes, result)
    if op == "linear":
        return _linear_axes(axes, result)
    if any(word in op for word in _CHANNELS_FIRST):
        return _spatial_axes(axes, result)
    if any(word in op for word in _CHANNELS_LAST):
        return ax.channels_last(axes)
    if op in _REDUCTIONS and result.ndim < x.ndim:
        return _reduced(args, kwargs, axes, result)
    if op in (*_REDUCTIONS, "softmax", "normalize", "pad", "roll"):
        return axes if result.shape == x.shape or op in ("pad", "roll") else ax.unknown(result.ndim)
    if op in ("matmul", "__matmul__", "bmm") and len(operands) == 2 and x is args[0]:
        return ax.multiplied(axes, operands[1][1])
    if op == "scaled_dot_product_attention" and len(operands) >= 3 and x is args[0]:
        return ax.multiplied(axes, operands[2][1])
    # elementwise functions: the argument with the shape of the result that tells most
    candidates = [a for t, a in operands if t.shape == result.shape]
    is_product = "matmul" in op or op in ("bmm", "einsum", "baddbmm", "scaled_dot_product_attention")
    if not candidates or (is_product and len(operands) > 1):
        return ax.unknown(result.ndim)
    return max(candidates, key=lambda a: len(a.names) - a.names.count("?"))


def _spatial_axes(axes: Axes, result: Tensor) -> Axes:
    return ax.channels_first(result.shape) if result.ndim == 4 else axes


def _linear_axes(axes: Axes, result: Tensor) -> Axes:
    return ax.channels_last(axes) if len(axes.names) == result.ndim else ax.unknown(result.ndim)


def _resized(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, axes: Axes, result: Tensor) -> Axes:
    """Return the axes of functions that add, remove or cut one axis."""
    dim = _argument(args, kwargs, 1, "dim", None)
    if op == "expand" and result.ndim == x.ndim:
        return axes
    if op == "unsqueeze" and isinstance(dim, int):
        dim %= result.ndim
        return Axes(axes.names[:dim] + "?" + axes.names[dim:], axes.grid, axes.n_prefix)
    if result.ndim == x.ndim - 1 and isinstance(dim, int):  # squeeze, select, unbind
        dim %= x.ndim
        names = axes.names[:dim] + axes.names[dim + 1 :]
        return Axes(names, axes.grid if "L" in names else None, axes.n_prefix if "L" in names else 0)
    return axes if result.shape == x.shape else ax.unknown(result.ndim)


def _reduced(args: Sequence[Any], kwargs: Mapping[str, Any], axes: Axes, result: Tensor) -> Axes:
    """Return the axes that a reduction leaves."""
    dims = _argument(args, kwargs, 1, "dim", kwargs.get("axis"))
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return ax.unknown(result.ndim)
    removed = {d % len(axes.names) for d in dims}
    names = "".join(name for i, name in enumerate(axes.names) if i not in removed)
    return Axes(names, axes.grid, axes.n_prefix) if "L" in names else Axes(names)


def einsum_terms(args: Sequence[Any]) -> tuple[list[str], str] | None:
    """Return the letters of the operands and of the result of an equation; None for one with an ellipsis or without a result."""
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    if "->" not in equation or "." in equation:
        return None
    terms, result = equation.split("->")
    return terms.split(","), result


def _einsum_axes(args: Sequence[Any], operands: Sequence[tuple[Tensor, Axes]], result: Tensor) -> Axes:
    terms = einsum_terms(args)
    if terms is None:
        return ax.unknown(result.ndim)
    values = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    axes_of = {id(t): a for t, a in operands}
    meaning: dict[str, str] = {}
    grid, n_prefix = None, 0
    for letters, tensor in zip(terms[0], values):
        axes = axes_of.get(id(tensor), ax.unknown(len(letters)))
        for letter, name in zip(letters, axes.names):
            if meaning.get(letter, "?") == "?":
                meaning[letter] = name
        if "L" in axes.names and grid is None:
            grid, n_prefix = axes.grid, axes.n_prefix
    names = "".join(meaning.get(letter, "?") for letter in terms[1])
    return Axes(names, grid, n_prefix) if names.count("L") == 1 else Axes(names.replace("L", "?"))


def _order(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], n_axes: int) -> list[int] | None:
    order = list(range(n_axes))
    if op in ("t", "T", "H"):
        return order[::-1]
    if op in ("mT", "mH"):
        return [*order[:-2], order[-1], order[-2]]
    if op == "permute":
        dims = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:] or kwargs.get("dims", ())
        return [int(d) % n_axes for d in dims] if len(dims) == n_axes else None
    names = (
        ("dim0", "dim1") if op == "transpose" else ("axis0", "axis1") if op == "swapaxes" else ("source", "destination")
    )
    first, second = (_argument(args, kwargs, k + 1, name, None) for k, name in enumerate(names))
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    first, second = first % n_axes, second % n_axes
    if op in ("movedim", "moveaxis"):
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = second, first
    return order


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)
