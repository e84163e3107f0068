"""Positions of the queries and keys of each attention of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.core.batches.batch_inputs import BatchInputs, Inputs, images_of, joined
from vitscope.core.guard.trial_pass import UntraceableError, first_that_runs, observing, trial_images
from vitscope.models.structure.attention_weights import PRODUCTS, AttentionCall, reading_calls
from vitscope.models.structure.execution import function_name, tensors
from vitscope.models.tracing.position_recorder import PositionRecorder, constant_positions
from vitscope.models.tracing.positions import Positions, expanded, is_same_along, result_positions


class AttentionPositions(NamedTuple):
    """Positions of the tokens of one attention, as fractions of the image's sides.

    Attributes:
        queries: (..., n_queries, 2) row, plus twice the number of the image, and column; NaN for constants, such as a class
            token or padding, infinite for tokens that mix positions.
        keys: (..., n_keys, 2) likewise; the axes before are those of the weights.
        is_transposed: Whether the model has its weights as (..., keys, queries).
    """

    queries: Tensor
    keys: Tensor
    is_transposed: bool = False


def attention_positions(
    model: nn.Module, owners: Mapping[nn.Module, str], images: Inputs | None = None
) -> tuple[dict[str, list[AttentionPositions | str]], tuple[int, int]]:
    """Return the positions of each attention, or why they are not known, by the name of the module's unit, and the image size.

    Two images of one size pass through the model in eval mode; weights, buffers, modes, gradients and random states are given
    back as they were. A model that does not run on them has no attention.

    Args:
        model: The model, not wrapped.
        owners: Names of units by the module in which they attend.
        images: (B, C, H, W), of which the first is used, or inputs of a batch that hold them, for a model that takes these; None
            for a random one of a size that the model states or takes.

    Raises:
        ValueError: Inputs of a batch without images, or with several entries of their form.
    """

    def observe(inputs: tuple[Any, Tensor]) -> tuple[dict[str, list[AttentionPositions | str]], tuple[int, int]]:
        x, pair = inputs
        recorder = _Recorder(pair)
        observed: dict[str, list[AttentionPositions | str]] = {}

        def note(owner: str, call: AttentionCall) -> None:
            observed.setdefault(owner, []).append(call.refusal or recorder.positions_in(call))

        # the reading of calls sees each function first, and calls it in the other mode
        with observing(model), recorder, reading_calls(owners, note):
            model.forward(x)
        return observed, recorder.size

    try:
        return first_that_runs(_pairs(model, images), observe)
    except UntraceableError:
        return {}, (0, 0)


def _pairs(model: nn.Module, images: Inputs | None) -> Iterator[tuple[Any, Tensor]]:
    """Yield inputs of two equal images, and these images among them."""
    if isinstance(images, BatchInputs):
        first = next(model.parameters(), torch.empty(0))
        inputs = images[:1].to(first.device, first.dtype if first.is_floating_point() else None)
        pair = joined([inputs, inputs])
        yield pair, images_of(pair, "attention")
        return
    for x in trial_images(model, images):
        pair = torch.cat((x, x))
        yield pair, pair


class _Recorder(PositionRecorder):
    """Follow the positions of each value, and those of keys along the last axis of products of queries and keys."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.keys: MutableMapping[Tensor, Positions | None] = WeakIdKeyDictionary()

    def positions_in(self, call: AttentionCall) -> AttentionPositions | str:
        """Return the positions of the tokens of an attention, or why they are not known."""
        if call.softmax is not None:
            rows, columns = self.positions.get(call.softmax), self.keys.get(call.softmax)
            sides = _tokens(rows, columns, -2) or _tokens(columns, rows, -2)
        else:
            assert call.query is not None
            assert call.key is not None
            sides = _tokens(self.positions_of(call.query), self.positions_of(call.key), -1)
        if sides is None:
            return "its queries and keys cannot be followed to positions of the image"
        return sides._replace(is_transposed=call.is_transposed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(result, Tensor):
            return result
        name = function_name(func)
        if name in PRODUCTS:
            self._note_product(name, args, result)
        elif any(t in self.keys for t in tensors((args, tuple(kwargs.values())))):
            self.keys[result] = result_positions(name, func, args, kwargs, self._keys_of, [result])[0]
        return result

    def _keys_of(self, tensor: Tensor) -> Positions | None:
        return self.keys[tensor] if tensor in self.keys else constant_positions(tensor)

    def _note_product(self, name: str, args: Any, result: Tensor) -> None:
        """Note the positions of the rows and the columns of a product of two values that depend on the images."""
        operands = list(tensors(args))
        if len(operands) != 2 or not all(self.varies(t) for t in operands) or any(t in self.keys for t in operands):
            return
        labels = _labels(args[0]) if name == "einsum" and isinstance(args[0], str) else None
        if labels is None:
            labels = _matrix_labels(operands[0].ndim)
        sides = [self._product_positions(t, axes, labels[-1], result) for t, axes in zip(operands, labels)]
        if any(side is None for side in sides):
            return
        self.positions[result], self.keys[result] = sides

    def _product_positions(self, tensor: Tensor, axes: str, labels: str, result: Tensor) -> Positions | None:
        """Return the positions of an operand as those of the product, if they are the same along the axes that are summed.

        Args:
            tensor: The operand.
            axes: Labels of its axes.
            labels: Labels of the result's axes.
            result: The product.
        """
        positions = self.positions_of(tensor)
        if positions is None or len(axes) != tensor.ndim or len(labels) != result.ndim:
            return None
        rows, columns = positions[:2]
        for axis in reversed(range(tensor.ndim)):
            if axes[axis] not in labels:
                if not is_same_along(positions, axis):
                    return None
                rows, columns = rows.select(axis, 0), columns.select(axis, 0)
        remaining = [label for label in axes if label in labels]
        order = [remaining.index(label) for label in labels if label in remaining]
        shape = [tensor.shape[axes.index(label)] if label in remaining else 1 for label in labels]
        rows, columns = (side.permute(order).reshape(shape) for side in (rows, columns))
        return expanded(Positions(rows, columns, positions.is_mean), result.shape)


def _tokens(queries: Positions | None, keys: Positions | None, axis: int) -> AttentionPositions | None:
    """Return the positions of tokens where they are the same along the last axis of queries and the given one of keys."""
    sides: list[Tensor] = []
    for positions, same in ((queries, -1), (keys, axis)):
        if positions is None or not is_same_along(positions, positions.rows.ndim + same):
            return None
        sides.append(torch.stack((positions.rows.select(same, 0), positions.columns.select(same, 0)), -1))
    return AttentionPositions(sides[0], sides[1])


def _labels(equation: str) -> tuple[str, str, str] | None:
    """Return the labels of both operands and of the result of an equation of ``einsum``; None for other forms."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    return (operands[0], operands[1], output) if arrow and len(operands) == 2 and "." not in equation else None


def _matrix_labels(n_axes: int) -> tuple[str, str, str]:
    """Return the labels of a product of matrices with the same axes before the last two."""
    batch = "abcdefgh"[: n_axes - 2]
    return batch + "qx", batch + "xk", batch + "qk"
