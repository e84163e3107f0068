"""Find residual branches that are MLPs of 1x1 convolutions, independent of the names of their modules.

Such a branch starts at the stream, passes at least two 1x1 convolutions with a nonlinearity between them, nothing else that
mixes positions, and is added to the stream that it started from. A branch with a depthwise convolution before (ConvNeXt) does
not start at the stream; squeeze and excitation starts at an average and is multiplied.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Stack = tuple[tuple[str, nn.Module], ...]

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_NONLINEAR = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "elu", "elu_", "celu", "selu", "leaky_relu", "leaky_relu_", "mish",
    "hardswish", "hardtanh", "prelu", "softplus", "sigmoid", "tanh", "clamp", "clamp_", "clamp_min", "square", "pow", "glu",
})  # fmt: skip
#: functions whose results are channels of their argument
_PARTS = frozenset({"chunk", "split", "tensor_split", "glu"})
#: words in the names of functions that mix positions or channels
_MIXING = (
    "conv",
    "pool",
    "linear",
    "matmul",
    "bmm",
    "einsum",
    "softmax",
    "interpolate",
    "pad",
    "roll",
    "fft",
    "cumsum",
    "flip",
)


@dataclass(frozen=True)
class _Path:
    """Operations between a tensor and the tensor at which a branch may have started.

    Attributes:
        convolutions: 1x1 convolutions on the way.
        nonlinear: Whether a nonlinearity lies between two of them.
        waiting: Whether one lies behind the last convolution.
        end: The modules that ran at the last convolution, outermost first.
    """

    convolutions: int = 0
    nonlinear: bool = False
    waiting: bool = False
    end: Stack = ()


class PointwiseBranches:
    """Follow the functions of one forward pass."""

    def __init__(self) -> None:
        # by tensor, with which the entry ends: its number, and by number the tensors from which it is made position by position
        self._ways: MutableMapping[Tensor, tuple[int, dict[int, _Path]]] = WeakIdKeyDictionary()
        self._numbers = count()

    def see(
        self, func: Any, varying: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor], stack: Stack
    ) -> Stack | None:
        """Take note of one function; return the modules at the last convolution of a branch that it adds to its stream.

        Args:
            func: The function.
            varying: Tensor arguments of the function that depend on the image.
            tensors: All of its tensors.
            results: Tensors that the function returned.
            stack: The modules that are running.
        """
        name = getattr(func, "__name__", "")
        ended, ways = None, {}
        if name in _ADDITIONS and len(varying) > 1:
            ended = self._ended(varying[0], varying[1]) or self._ended(varying[1], varying[0])
        elif len(varying) == 2 and "mul" in name:  # a gated unit, a square
            a, b = self._of(varying[0]), self._of(varying[1])
            longer = {root: max(a[root], b[root], key=lambda way: way.convolutions) for root in a if root in b}
            ways = {root: replace(way, waiting=True) for root, way in longer.items()}
        elif len(varying) == 1:
            ways = self._next(name, varying[0], tensors, results[0], stack)
        for result in results:
            self._set(result, ways)
        return ended

    def _of(self, tensor: Tensor) -> dict[int, _Path]:
        return self._ways[tensor][1] if tensor in self._ways else self._set(tensor, {})

    def _set(self, tensor: Tensor, ways: dict[int, _Path]) -> dict[int, _Path]:
        number = self._ways[tensor][0] if tensor in self._ways else next(self._numbers)  # one that was changed in place
        self._ways[tensor] = number, {**ways, number: _Path()}
        return self._ways[tensor][1]

    def _next(self, name: str, x: Tensor, tensors: Sequence[Tensor], result: Tensor, stack: Stack) -> dict[int, _Path]:
        ways = self._of(x)
        if name == "conv2d":
            if not _is_pointwise(x, tensors, result):
                return {}
            return {
                root: _Path(way.convolutions + 1, way.nonlinear or (way.waiting and way.convolutions > 0), False, stack)
                for root, way in ways.items()
            }
        if any(word in name for word in _MIXING):
            return {}
        if result.numel() != x.numel() and name not in _PARTS:  # an average, an upsampled map
            return {}
        return {root: replace(way, waiting=True) for root, way in ways.items()} if name in _NONLINEAR else ways

    def _ended(self, branch: Tensor, stream: Tensor) -> Stack | None:
        self._of(stream)
        way = self._of(branch).get(self._ways[stream][0])
        return way.end if way is not None and way.convolutions > 1 and way.nonlinear else None


def _is_pointwise(x: Tensor, tensors: Sequence[Tensor], result: Tensor) -> bool:
    """Whether a convolution of ``x (B, C, H, W)`` is 1x1, mixes channels, has no stride and sees several positions."""
    weight = next((t for t in tensors if t is not x and t.ndim == 4), x)
    same_size = x.shape[-2:] == result.shape[-2:] and x.shape[-2:].numel() > 1
    return same_size and tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] > 1
