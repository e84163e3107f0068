"""Convolutions, BatchNorm and attention with efficient second derivatives.

PyTorch differentiates a convolution's backward pass by convolutions with the image as kernel, one group at a time. But that
pass is bilinear in the output's gradient and in (image, kernel), so its derivative is two convolutions and one more backward
pass with the tangents in the place of image and kernel: a product with the Hessian of a convolutional network then costs two
gradients, not three. BatchNorm with running statistics is an affine map and is differentiated as one. Attention over many tokens
is differentiated by blocks (`vitscope.linalg.curvature.blockwise_attention`).

`BilinearConvDoubleBackward` puts these in the place of the calls a model makes, whatever its modules are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitscope.linalg.curvature.blockwise_attention import blockwise_attention

aten = torch.ops.aten


class BilinearConvDoubleBackward(TorchFunctionMode):
    """Within this context calls of a model are replaced by equal ones that can be differentiated twice, and cheaply.

    Numbers agree with PyTorch's to rounding. What it does not know (transposed, complex or unevenly padded convolutions,
    tensors of other classes, BatchNorm with the batch's statistics) is left as it is. Keep it open during backward passes too:
    activation checkpoints call the model again there. Not for `torch.func`, whose transforms the replacements do not know.

    Args:
        convolutions: Whether convolutions are replaced; PyTorch's are as cheap where the second pass differentiates by the
            first one's argument alone, as in products with the Gauss-Newton matrix.
    """

    def __init__(self, convolutions: bool = True) -> None:
        super().__init__()
        self.convolutions = convolutions

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the replacement of ``func``, or ``func``."""
        kwargs = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        if replacement is None or (replacement is _convolution and not self.convolutions):
            return func(*args, **kwargs)
        result = replacement(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Return the convolution of a batch ``x (B, C, ...)``, or NotImplemented."""
    is_supported = type(x) is Tensor and isinstance(weight, Tensor) and x.ndim == weight.ndim and not x.is_complex()
    n = weight.ndim - 2
    reach = [d * (size - 1) for d, size in zip(_each(dilation, n), weight.shape[2:])]
    if not is_supported or (padding == "same" and any(r % 2 for r in reach)):
        return NotImplemented
    if padding == "same":
        padding = [r // 2 for r in reach]
    elif padding == "valid":
        padding = 0
    return _Convolution.apply(x, weight, bias, *(_each(v, n) for v in (stride, padding, dilation)), groups)


def _each(value: Any, n: int) -> list[int]:
    """Return one number an axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, False, [0] * len(stride), groups
        return aten.convolution(x, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_gradient = ctx.needs_input_grad[:3]
        dx, dw = _Backward.apply(g, x, weight, ctx.options, needs_gradient[:2])
        db = g.sum([axis for axis in range(g.ndim) if axis != 1]) if needs_gradient[2] else None
        return dx, dw, db, None, None, None, None


class _Backward(torch.autograd.Function):
    """The gradients of image and kernel, each bilinear in ``g`` and the other one."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, options: tuple, needs_gradient: tuple[bool, bool]
    ) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, weight, None, *options, [*needs_gradient, False])[:2]

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> Any:
        """Take what is propagated to the gradients of image (``u``) and kernel (``v``)."""
        g, x, weight = ctx.saved_tensors
        dg = None
        if ctx.needs_input_grad[0]:
            parts = [
                aten.convolution(image, kernel, None, *ctx.options)
                for image, kernel in ((u, weight), (x, v))
                if image is not None and kernel is not None
            ]
            dg = parts[0].add_(parts[1]) if len(parts) > 1 else next(iter(parts), None)
        needs_gradient = [ctx.needs_input_grad[1] and v is not None, ctx.needs_input_grad[2] and u is not None, False]
        dx, dw = None, None
        if any(needs_gradient):
            # where nothing is propagated to one of them, the other's gradient is not computed and does not read it
            image = x if u is None else u
            kernel = weight if v is None else v
            dx, dw, _ = aten.convolution_backward(g, image, kernel, None, *ctx.options, needs_gradient)
        return dg, dx, dw, None, None


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Return ``x (B, C, ...)`` normalized with running statistics, or NotImplemented."""
    if training or mean is None or variance is None or x.ndim < 2:
        return NotImplemented
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """Return the hard sigmoid, whose backward pass PyTorch cannot differentiate."""
    return F.relu6(x + 3.0) / 6.0


#: replacements by the function called: they return the same numbers, or NotImplemented
REPLACEMENTS: dict[Callable, Callable[..., Any]] = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.hardsigmoid: _hardsigmoid,
    F.scaled_dot_product_attention: blockwise_attention,
}
