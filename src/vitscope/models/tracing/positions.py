"""Positions of a tensor's elements in the image, carried from function to function.

Each value of a pass is accompanied by two tensors of its shape: the number of the image and the row, and the column, both as
fractions of the image's sides. Functions that rearrange are applied to them; pooling averages them; layers of weights keep
them where they mix channels of one position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.models.structure.execution import tensors as tensors_of
from vitscope.models.tracing.additions import ACTIVATIONS

#: an element that was made of constants, such as a class token or padding
CONSTANT = float("nan")
#: an element that mixes positions or whose position is not known
MIXED = float("inf")

_REARRANGEMENTS = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T",
    "mT", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile", "roll", "flip", "rot90", "narrow", "select",
    "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "cat", "concat", "concatenate", "stack", "__getitem__",
    "index_select", "unfold", "fold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat_interleave", "gather",
    "take_along_dim", "__setitem__", "view_as", "reshape_as", "_unsafe_view", "broadcast_to",
})  # fmt: skip
_SAME = frozenset({
    "contiguous", "clone", "to", "float", "half", "double", "bfloat16", "type", "type_as", "detach", "alias", "cpu", "cuda",
    "requires_grad_", "identity", "dropout", "dropout_", "dropout2d", "feature_dropout", "alpha_dropout", "copy_", "real",
    "imag", "conj", "resolve_conj",
})  # fmt: skip
_ELEMENTWISE = ACTIVATIONS | frozenset({
    "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "__isub__", "sub_", "mul", "__mul__",
    "__rmul__", "__imul__", "mul_", "div", "__truediv__", "__itruediv__", "div_", "addcmul", "addcmul_", "lerp", "exp", "log",
    "abs", "square", "pow", "__pow__", "sqrt", "rsqrt", "neg", "sin", "cos", "erf", "softmax", "log_softmax", "normalize",
    "maximum", "minimum", "where", "masked_fill", "masked_fill_", "nan_to_num", "hardsigmoid", "logsigmoid", "celu", "selu",
    "clamp_min", "clamp_max", "softsign", "threshold", "threshold_", "hardswish_", "hardtanh_", "elu_", "sigmoid_", "tanh_",
    "gelu_", "mish_", "relu6_", "silu_", "complex", "polar", "angle", "layer_norm", "rms_norm", "batch_norm", "group_norm",
    "instance_norm",
    "multi_head_attention_forward",
})  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "max", "min"})
_MAP_FUNCTIONS = ("conv2d", "conv_transpose2d", "pool2d", "interpolate", "upsample")


class Positions(NamedTuple):
    """Positions of the elements of a tensor.

    Attributes:
        rows: A tensor of the same shape: the row as a fraction of the image's height, plus twice the number of the image.
        columns: A tensor of the same shape: the column as a fraction of the image's width.
        is_mean: Whether they are means over positions that a layer has mixed, such as the pixels of a patch.
    """

    rows: Tensor
    columns: Tensor
    is_mean: bool = False


#: gives the positions of a tensor; `CONSTANT` ones for constants, None where they are not known
PositionsOf = Callable[[Tensor], Positions | None]


def map_positions(n_images: int, height: int, width: int) -> Positions:
    """Return the positions of a whole map ``(n_images, 1, height, width)``."""
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    first = 2 * torch.arange(n_images, dtype=torch.float64)[:, None, None, None] + rows[:, None]
    shape = (n_images, 1, height, width)
    return Positions(first.expand(shape), columns.expand(shape))


def expanded(positions: Positions, shape: Sequence[int]) -> Positions:
    """Return positions as tensors of a shape to which they can be broadcast."""
    return Positions(positions.rows.expand(shape), positions.columns.expand(shape), positions.is_mean)


def compact(positions: Positions) -> Positions:
    """Return the same positions, in the memory of one number where no element has a position of its own."""
    rows, columns = positions.rows, positions.columns
    if rows.numel() > 1 and all(bool(side.isinf().all()) for side in _distinct(rows, columns)):
        mixed = rows.new_full((), MIXED).expand(rows.shape)
        return Positions(mixed, mixed, positions.is_mean)
    return positions


def result_positions(
    op: str,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    positions_of: PositionsOf,
    results: Sequence[Tensor],
) -> list[Positions | None]:
    """Return the positions of each tensor that a function returned; None where they are not known.

    Args:
        op: The function's name.
        func: The function.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.
        positions_of: Function that gives the positions of its arguments.
        results: Tensors that it returned.
    """
    if op == "pad" and kwargs.get("mode", "constant") == "constant":
        kwargs = {**kwargs, "value": CONSTANT}
    if op == "pad" and len(args) > 2:  # its mode and value by position
        positions = []
    elif op in _REARRANGEMENTS or op == "pad":
        positions = _rearranged(func, args, kwargs, positions_of, results)
    else:
        positions = [_computed(op, args, kwargs, positions_of, results[0].shape)]
    # only the first result of a function that computes values is followed
    return [*positions, *(None for _ in results[len(positions) :])]


def _computed(
    op: str, args: Sequence[Any], kwargs: Mapping[str, Any], positions_of: PositionsOf, shape: torch.Size
) -> Positions | None:
    """Return the positions of the first result, which has a shape, of a function that computes values."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if op in _ELEMENTWISE:
        # the other tensors of norms and attention are weights and keys
        operands = tensors[:1] if op.endswith(("norm", "forward")) else tensors
        return _combined([(tensor.shape, positions_of(tensor)) for tensor in operands], shape)
    source = args[1] if op == "copy_" else next(iter(tensors), None)
    x = positions_of(source) if isinstance(source, Tensor) else None
    if x is None:
        return None
    if op in _SAME:
        return x if x.rows.shape == shape else None
    if op in ("view_as_complex", "view_as_real"):
        return _over_parts(x, shape)
    if op in _REDUCTIONS:
        return _reduced(x, args, kwargs, shape)
    if any(word in op for word in _MAP_FUNCTIONS) or op in ("boolean_dispatch", "fn"):
        return _next_map(x, shape)
    if op in ("linear", "scaled_dot_product_attention"):
        return _over_channels(x, shape, op == "linear")
    if op in ("matmul", "__matmul__", "bmm"):
        return _product(x, args, positions_of, shape)
    return None


def is_constant(positions: Positions) -> bool:
    """Whether nothing of a tensor comes from the images."""
    return bool(_distinct(positions.rows)[0].isnan().all())


def _distinct(*sides: Tensor) -> list[Tensor]:
    """Return tensors of one shape with one element along each axis that repeats it in all of them without memory."""
    repeated = [axis for axis in range(sides[0].ndim) if all(side.stride(axis) == 0 for side in sides)]
    shortened = list(sides)
    for axis in repeated:
        shortened = [side[(slice(None),) * axis + (slice(0, 1),)] for side in shortened]  # also of an axis of length 0
    return shortened


def _rearranged(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    positions_of: PositionsOf,
    results: Sequence[Tensor],
) -> list[Positions | None]:
    """Apply the function to the positions of its floating-point arguments; return none where that is not possible."""
    try:
        rows, columns = (
            _applied(func, *_with_positions((tuple(args), dict(kwargs)), positions_of, side))
            for side in ("rows", "columns")
        )
    except (LookupError, RuntimeError, TypeError, ValueError):
        return []
    if [side.shape for side in rows] != [result.shape for result in results]:
        return []
    moved = [positions_of(t) for t in tensors_of((args, kwargs)) if t.is_floating_point() or t.is_complex()]
    is_mean = any(positions is not None and positions.is_mean for positions in moved)
    return [Positions(*sides, is_mean) for sides in zip(rows, columns)]


def _with_positions(value: Any, positions_of: PositionsOf, side: str) -> Any:
    """Return arguments with ``rows`` or ``columns`` of positions, the ``side``, in place of their floating-point tensors.

    Raises:
        LookupError: A tensor without known positions, or indices that depend on the images.
    """
    if isinstance(value, tuple | list):
        return type(value)([_with_positions(entry, positions_of, side) for entry in value])
    if isinstance(value, dict):
        return {key: _with_positions(entry, positions_of, side) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    positions = positions_of(value)
    if positions is None:
        raise LookupError
    if value.is_floating_point() or value.is_complex():
        return getattr(positions, side)
    if not is_constant(positions):
        raise LookupError
    return value.cpu()


def _applied(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a function makes of positions; these are not in memory as the values are, and are not changed."""
    if func is Tensor.__setitem__:
        target = args[0].clone()
        func(target, *args[1:])
        return [target]
    function = Tensor.reshape if func is Tensor.view else func
    output = function(*args, **kwargs)
    return [output] if isinstance(output, Tensor) else list(output)


def _over_parts(x: Positions, shape: torch.Size) -> Positions | None:
    """Return the positions of complex numbers whose two parts lie along the last axis, or of these parts."""
    if len(shape) > x.rows.ndim:
        return expanded(Positions(x.rows[..., None], x.columns[..., None], x.is_mean), shape)
    if not is_same_along(x, x.rows.ndim - 1):
        return None
    return Positions(x.rows[..., 0], x.columns[..., 0], x.is_mean)


def _combined(operands: Sequence[tuple[torch.Size, Positions | None]], shape: torch.Size) -> Positions | None:
    """Return the positions of an elementwise result: those of its arguments of the same shape, as far as they agree.

    They are not known where an argument's are not and all others are constants.
    """
    followed = [(size, positions) for size, positions in operands if positions is not None]
    varying = [(size, positions) for size, positions in followed if not is_constant(positions)]
    if len(followed) < len(operands) and not varying:
        return None
    candidates = [positions for size, positions in varying if size == shape]
    candidates = [positions for positions in candidates if not positions.is_mean] or candidates
    if not candidates:
        candidates = [expanded(positions, shape) for size, positions in followed if size != shape]
    if not candidates:
        return None
    result = candidates[0]
    for other in candidates[1:]:
        result = Positions(_merged(result.rows, other.rows), _merged(result.columns, other.columns), other.is_mean)
    return result


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Return one side of positions where both agree or one alone is known, else `MIXED`; a constant says nothing."""
    shape, mixed = a.shape, torch.full((), MIXED, dtype=a.dtype)
    a, b = _distinct(a, b)
    equal = torch.isclose(a, b, rtol=0, atol=1e-6, equal_nan=True)
    merged = torch.where(equal, a, mixed)
    merged = torch.where(a.isnan() | (a.isinf() & ~b.isnan()), b, merged)
    return torch.where(b.isnan() | (b.isinf() & ~a.isnan()), a, merged).expand(shape)


def _reduced(x: Positions, args: Sequence[Any], kwargs: Mapping[str, Any], shape: torch.Size) -> Positions | None:
    """Return the mean position over the axes that a reduction removes."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if not isinstance(dims, int | tuple | list) or isinstance(dims, bool):
        return None
    return Positions(_mean(x.rows, dims).reshape(shape), _mean(x.columns, dims).reshape(shape), x.is_mean)


def _mean(side: Tensor, dims: Any) -> Tensor:
    constant = side.isnan()
    some, every = constant.sum(dims) > 0, (~constant).sum(dims) == 0
    mean = side.nan_to_num(nan=0.0, posinf=MIXED).mean(dims)
    mean = torch.where(some, torch.full((), MIXED, dtype=side.dtype), mean)
    return torch.where(every, torch.full((), CONSTANT, dtype=side.dtype), mean)


def _over_channels(x: Positions, shape: torch.Size, mixes: bool) -> Positions | None:
    """Return the positions of a result whose last axis is made of the last axis of an argument.

    Where that axis holds several positions and a layer ``mixes`` them, as the pixels of a patch, their mean is the position,
    unless it is the same for the whole image.
    """
    if x.rows.shape[:-1] != shape[:-1]:
        return None
    if is_same_along(x, x.rows.ndim - 1):
        return expanded(Positions(x.rows[..., :1], x.columns[..., :1], x.is_mean), shape)
    if not mixes:
        return None
    rows, columns = _mean(x.rows, -1), _mean(x.columns, -1)
    if len(torch.stack((rows % 2, columns)).flatten(1).unique(dim=1).T) < 2:
        return None
    return expanded(Positions(rows[..., None], columns[..., None], True), shape)


def _product(x: Positions, args: Sequence[Any], positions_of: PositionsOf, shape: torch.Size) -> Positions | None:
    """Return the positions of a matrix product.

    A matrix of weights acts as a linear layer. Of two factors that depend on the images, the first one gives the positions of
    rows, as queries do, or the second one those of columns, if it has one position along the axis that is summed.
    """
    second = positions_of(args[1]) if len(args) > 1 and isinstance(args[1], Tensor) else None
    is_layer = second is not None and second.rows.ndim == 2 and is_constant(second)
    by_rows = _over_channels(x, shape, is_layer)
    if by_rows is not None or second is None or second.rows.ndim < 2 or not is_same_along(second, second.rows.ndim - 2):
        return by_rows
    columns = Positions(second.rows[..., :1, :], second.columns[..., :1, :], second.is_mean)
    return expanded(columns, shape) if second.rows.shape[:-2] == shape[:-2] else None


def is_same_along(x: Positions, axis: int) -> bool:
    """Whether all elements along an axis have one position."""
    for side in (x.rows, x.columns):
        if side.stride(axis) == 0:
            continue
        distinct = _distinct(side)[0]
        first = distinct.narrow(axis, 0, 1)
        if not torch.isclose(distinct, first, rtol=0, atol=1e-6, equal_nan=True).all():
            return False
    return True


def _next_map(x: Positions, shape: torch.Size) -> Positions | None:
    """Return the positions of a map ``(B, C, h, w)`` that a convolution, pooling or resampling made of another one."""
    if x.rows.ndim != 4 or len(shape) != 4 or not is_same_along(x, 1):
        return None
    sides = Positions(x.rows[:, :1], x.columns[:, :1], x.is_mean)
    n, _, height, width = sides.rows.shape
    if any(_is_whole_map(map_) for map_ in (sides, _without_padding(sides))):
        return expanded(map_positions(n, shape[2], shape[3]), shape)
    if (height, width) == tuple(shape[2:]):
        return expanded(sides, shape)
    if height % shape[2] or width % shape[3]:
        return None
    rows, columns = (F.adaptive_avg_pool2d(side, (shape[2], shape[3])) for side in sides[:2])
    return expanded(Positions(rows, columns, x.is_mean), shape)


def _is_whole_map(x: Positions) -> bool:
    """Whether positions (n, 1, h, w) are those of a whole map of each image."""
    n, _, height, width = x.rows.shape
    whole = map_positions(n, height, width)
    return all(bool(torch.isclose(a, b, rtol=0, atol=1e-6).all()) for a, b in zip(x[:2], whole[:2]))


def _without_padding(x: Positions) -> Positions:
    """Return positions (n, 1, h, w) without the rows and columns at the border that hold constants alone."""
    is_constant_cell = x.rows.isnan().all(dim=0)[0]  # (h, w)
    rows, columns = ((~is_constant_cell).any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        return x
    inside = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Positions(x.rows[..., *inside], x.columns[..., *inside], x.is_mean)
