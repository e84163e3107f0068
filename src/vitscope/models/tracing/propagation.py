"""Axes of a function's result, from those of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitscope.models.structure.execution import argument
from vitscope.models.tracing import axes as ax
from vitscope.models.tracing.axes import Axes

#: functions of maps (B, C, H, W) or sequences (B, C, L), by a word of their names
_CHANNELS_FIRST = (
    "conv", "pool", "batch_norm", "group_norm", "instance_norm", "interpolate", "upsample", "pixel_", "grid_sample",
)  # fmt: skip
_CHANNELS_LAST = ("layer_norm", "rms_norm")
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"})
_PERMUTATIONS = frozenset({
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "mH",
})  # fmt: skip
_PIECES = frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})
#: functions after which positions may stand in another order
_REORDERINGS = frozenset({
    "gather", "take_along_dim", "sort", "argsort", "topk", "index_select", "scatter", "scatter_", "index_put", "index_put_",
    "masked_select", "flip",
})  # fmt: skip
_JOINS = frozenset({"cat", "concat", "concatenate"})
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "max", "min"})
#: functions that add, remove or cut one axis
_RESIZES = frozenset({"unsqueeze", "squeeze", "expand", "select", "unbind", "narrow"})
#: products of two matrices: rows of the first one, columns of the second
_MATRIX_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})
#: products that sum over axes of which nothing is known here
_OTHER_PRODUCTS = frozenset({
    "tensordot", "inner", "linear", "bilinear", "linalg_vecdot", "linalg_multi_dot", "chain_matmul", "mv",
})  # fmt: skip


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function.

    Attributes:
        op: The function's name.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.
        operands: The call's tensor arguments that are no parameters, with their axes; those that depend on the images first.
        results: Tensors that it returned.
    """

    op: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    operands: Sequence[tuple[Tensor, Axes]]
    results: Sequence[Tensor]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return argument(self.args, self.kwargs, place, name, default)

    def axes_of(self, tensor: Tensor) -> Axes:
        """Return the axes of an argument; unknown ones for a parameter."""
        return next((axes for operand, axes in self.operands if operand is tensor), ax.unknown(tensor.ndim))


def result_axes(call: FunctionCall) -> list[Axes]:
    """Return the axes of each tensor that a function returned."""
    if not call.operands:
        return [ax.unknown(result.ndim) for result in call.results]
    if call.op in _PIECES:
        return _axes_of_pieces(call)
    if call.op in _JOINS:
        return [_joined(call)]
    if call.op == "stack":
        return [_stacked(call)]
    if call.op == "einsum":
        return [_einsum_axes(call)]
    axes = _common_axes(call)
    return [axes if len(axes.names) == result.ndim else ax.unknown(result.ndim) for result in call.results]


def _common_axes(call: FunctionCall) -> Axes:
    """Return the axes of all results of a function that neither cuts nor joins tensors."""
    op, (x, axes), result = call.op, call.operands[0], call.results[0]
    # functions that rearrange
    if op in _REORDERINGS:
        return ax.unknown(result.ndim)
    if op in _RESHAPES:
        return ax.reshaped(axes, x.shape, result.shape)
    if op in _PERMUTATIONS:
        return ax.permuted(axes, ax.axis_order(op, call.args, call.kwargs, x.ndim))
    if op == "__getitem__":
        return ax.indexed(axes, x.shape, call.args[1])
    if op in _RESIZES:
        return _resized(call)
    if op in ("pad", "roll"):
        return axes
    # layers, norms and pooling
    if op == "linear":
        return ax.channels_last(axes) if len(axes.names) == result.ndim else ax.unknown(result.ndim)
    if any(word in op for word in _CHANNELS_FIRST):
        return ax.channels_first(result.shape) if result.ndim == 4 else axes
    if any(word in op for word in _CHANNELS_LAST):
        return ax.channels_last(axes)
    # reductions, and functions along an axis that they keep
    if op in _REDUCTIONS and result.ndim < x.ndim:
        return _reduced(call)
    if op in _REDUCTIONS or op in ("softmax", "normalize"):
        return axes if result.shape == x.shape else ax.unknown(result.ndim)
    is_product = "matmul" in op or op in ("bmm", "baddbmm", "scaled_dot_product_attention")
    if is_product and len(call.operands) > 1:
        return _multiplied(call)
    return _elementwise_axes(call)


def _axes_of_pieces(call: FunctionCall) -> list[Axes]:
    axes, dim = call.operands[0][1], call.argument(2, "dim", 0)
    if not isinstance(dim, int):
        return [axes for _ in call.results]
    return ax.pieces(axes, [piece.shape for piece in call.results], dim)


def _joined(call: FunctionCall) -> Axes:
    parts = [(call.axes_of(tensor), tensor.shape) for tensor in call.argument(0, "tensors", ())]
    return ax.joined(parts, call.argument(1, "dim", 0))


def _stacked(call: FunctionCall) -> Axes:
    axes, dim = call.operands[0][1], call.argument(1, "dim", 0) % call.results[0].ndim
    return Axes(axes.names[:dim] + "?" + axes.names[dim:], axes.grid, axes.n_prefix)


def _multiplied(call: FunctionCall) -> Axes:
    """Return the axes of a product of values whose first factor is the function's first argument."""
    x, axes = call.operands[0]
    if x is call.args[0]:
        if call.op in _MATRIX_PRODUCTS and len(call.operands) == 2:
            return ax.multiplied(axes, call.operands[1][1])
        if call.op == "scaled_dot_product_attention" and len(call.operands) >= 3:
            return ax.multiplied(axes, call.operands[2][1])  # positions of the queries, channels of the values
    return ax.unknown(call.results[0].ndim)


def _elementwise_axes(call: FunctionCall) -> Axes:
    """Return the axes of the argument with the shape of the result of whose axes most are known."""
    result = call.results[0]
    candidates = [axes for tensor, axes in call.operands if tensor.shape == result.shape]
    return max(candidates, key=lambda axes: axes.n_known, default=ax.unknown(result.ndim))


def _resized(call: FunctionCall) -> Axes:
    """Return the axes of functions that add, remove or cut one axis."""
    op, (x, axes), result = call.op, call.operands[0], call.results[0]
    dim = call.argument(1, "dim")
    if op == "expand" and result.ndim == x.ndim:
        return axes
    if op == "unsqueeze" and isinstance(dim, int):
        dim %= result.ndim
        return Axes(axes.names[:dim] + "?" + axes.names[dim:], axes.grid, axes.n_prefix)
    if result.ndim == x.ndim - 1 and isinstance(dim, int):  # squeeze, select, unbind
        dim %= x.ndim
        return axes.renamed(axes.names[:dim] + axes.names[dim + 1 :])
    return axes if result.shape == x.shape else ax.unknown(result.ndim)


def _reduced(call: FunctionCall) -> Axes:
    """Return the axes that a reduction leaves."""
    axes = call.operands[0][1]
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return ax.unknown(call.results[0].ndim)
    removed = {d % len(axes.names) for d in dims}
    return axes.renamed("".join(name for i, name in enumerate(axes.names) if i not in removed))


def einsum_terms(args: Sequence[Any]) -> tuple[list[str], str] | None:
    """Return the letters of the operands and of the result of an equation; None for one with an ellipsis or without a result."""
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    if "->" not in equation or "." in equation:
        return None
    terms, result = equation.split("->")
    return terms.split(","), result


def _einsum_axes(call: FunctionCall) -> Axes:
    """Return the axes of the result of an equation: a letter means what it means in the first operand that knows it."""
    args = call.args
    terms = einsum_terms(args)
    if terms is None:
        return ax.unknown(call.results[0].ndim)
    operand_letters, result_letters = terms
    values = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    name_of: dict[str, str] = {}
    tokens: Axes | None = None  # of the first operand whose tokens have a known grid
    for letters, tensor in zip(operand_letters, values):
        axes = call.axes_of(tensor)
        for letter, name in zip(letters, axes.names):
            if name_of.get(letter, "?") == "?":
                name_of[letter] = name
        if "L" in axes.names and (tokens is None or tokens.grid is None):
            tokens = axes
    names = "".join(name_of.get(letter, "?") for letter in result_letters)
    if tokens is None or names.count("L") != 1:
        return Axes(names.replace("L", "?"))
    return Axes(names, tokens.grid, tokens.n_prefix)


def contracted_axes(op: str, args: Sequence[Any], factors: Sequence[Axes]) -> tuple[set[str], set[str]]:
    """Return the meanings of the axes that a product of two factors sums over, and of those that both have in the result.

    Args:
        op: Name of the function, a product.
        args: The call's positional arguments.
        factors: The axes of the factors.
    """
    if op == "einsum":
        return _einsum_contraction(args, factors)
    if op in _OTHER_PRODUCTS:
        return {"?"}, set()
    first, second = (axes.names for axes in factors[:2])
    # (..., n, k) times (..., k, m)
    return {first[-1:] or "?", second[-2:-1] or "?"}, set(first[:-2]) & set(second[:-2])


def _einsum_contraction(args: Sequence[Any], factors: Sequence[Axes]) -> tuple[set[str], set[str]]:
    """Return the meanings of the letters that an equation sums over, and of those that it keeps."""
    terms = einsum_terms(args)
    if terms is None or len(terms[0]) != len(factors):
        return {"?"}, set()
    operand_letters, result_letters = terms
    contracted, remaining = set[str](), set[str]()
    for letters, axes in zip(operand_letters, factors):
        for letter, name in zip(letters, axes.names):
            (remaining if letter in result_letters else contracted).add(name)
    return contracted, remaining
