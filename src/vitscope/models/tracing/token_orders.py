"""Order in which tensors hold the positions of a map, shown by one forward pass with the positions of every value."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.core.tap import TokenOrder
from vitscope.models.structure.execution import enter_guards, tensors, trial_images
from vitscope.models.structure.feature_maps import SPATIAL
from vitscope.models.structure.residual_structure import Read
from vitscope.models.tracing.positions import (
    CONSTANT,
    Positions,
    compact,
    expanded,
    is_constant,
    is_same_along,
    map_positions,
    result_positions,
)
from vitscope.models.tracing.recorder import function_name

#: functions whose results have the shape of their argument and none of its values
_NEW = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")


def with_orders(model: nn.Module, reads: Sequence[Read | None], images: Tensor | None = None) -> list[Read | None]:
    """Return the reads; those of tensors whose layout or grid is not known with the order of their tokens.

    The model runs only where there is such a tensor. Arguments are those of `token_orders`.
    """
    has_maps = any(isinstance(module, SPATIAL) for module in model.modules())
    sought = {str(i): read for i, read in enumerate(reads) if read is not None and _needs_order(read, has_maps)}
    orders = token_orders(model, sought, images) if sought else {}
    return [
        replace(read, order=orders.get(str(i), _reason(read))) if read is not None else None
        for i, read in enumerate(reads)
    ]


def _needs_order(read: Read, has_maps: bool) -> bool:
    """Whether the grid of a tensor is not known; ``has_maps``: the model has convolutions or pooling, which may show it."""
    if read.at == "sum" or not read.exact or not read.has_map:
        return False
    return read.layout == "unknown" or not read.shows_grid or (read.layout in ("NLC", "NCL") and not has_maps)


def _reason(read: Read) -> str | None:
    """Return why no order is sought for a tensor, if its layout is unknown."""
    if read.layout != "unknown":
        return None
    if read.at == "sum":
        return "its positions are not followed inside of a module"
    return "it is scaled or cut before it is added" if read.has_map else "it holds no map, as a class token alone"


def token_orders(
    model: nn.Module, reads: Mapping[str, Read], images: Tensor | None = None
) -> dict[str, TokenOrder | str]:
    """Return the order of positions in tensors of a forward pass, or why it is not certain.

    Two images pass through the model in eval mode; weights, buffers, modes, gradients and random states are given back as they
    were. The order holds for images of this size.

    Args:
        model: The model, not wrapped.
        reads: The tensors by name.
        images: (B, C, H, W), of which the first is used; None for a random one of a size that the model states or takes.
    """
    for first in trial_images(model, images):
        x = torch.cat((first, first))
        recorder = _Recorder(model, x, reads)
        try:
            with ExitStack() as stack:
                enter_guards(stack, model)
                stack.enter_context(recorder.hooks())
                with recorder:
                    model.forward(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ValueError):
            continue
        return {
            name: _order(recorder.read_positions[name], recorder.size)
            if name in recorder.read_positions
            else "the forward pass does not run it"
            for name in reads
        }
    return dict.fromkeys(reads, "the model does not run on two images of one size")


class _Recorder(TorchFunctionMode):
    """Follow the positions of each value, and find the order of those that are read."""

    def __init__(self, model: nn.Module, images: Tensor, reads: Mapping[str, Read]) -> None:
        super().__init__()
        self.model, self.reads = model, reads
        self.size = (int(images.shape[-2]), int(images.shape[-1]))
        # entries end with their tensors: all activations of a large network would not fit into memory
        self.positions: MutableMapping[Tensor, Positions | None] = WeakIdKeyDictionary()
        self.positions[images] = expanded(map_positions(len(images), *self.size), images.shape)
        self.calls: dict[nn.Module, int] = {}
        self.read_positions: dict[str, Positions | None] = {}

    def hooks(self) -> ExitStack:
        """Read inputs and outputs of the modules while the returned context is open."""
        stack = ExitStack()
        for module in {read.module: None for read in self.reads.values()}:
            before = module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            after = module.register_forward_hook(self._on_output)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        call = self.calls[module] = self.calls.get(module, -1) + 1
        self._read(module, "input", call, (args, options))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._read(module, "output", self.calls[module], output)

    def _read(self, module: nn.Module, at: str, call: int, values: Any) -> None:
        for name, read in self.reads.items():
            value = next(tensors(values), None)
            if value is None or (read.module, read.at, read.call) != (module, at, call):
                continue
            self.read_positions[name] = self._known(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = function_name(func)
        results = [args[0]] if name == "__setitem__" else list(tensors(result))
        if not results:
            return result
        arguments = list(tensors((args, tuple(kwargs.values()))))
        if name.startswith(_NEW) or not any(self._varies(t) for t in arguments):
            positions: list[Positions | None] = [_constant(t) for t in results]
        else:
            positions = result_positions(name, func, args, kwargs, self._known, results)
        for tensor, values in zip(results, positions):
            self.positions[tensor] = None if values is None else compact(values)
        base = getattr(results[0], "_base", None)
        if name in ("copy_", "__setitem__") and base is not None and base is not results[0]:
            self.positions[base] = None
        return result

    def _known(self, tensor: Tensor) -> Positions | None:
        """Return the positions of a tensor; one that no function of the pass made is a constant if it has no gradient."""
        if tensor in self.positions:
            return self.positions[tensor]
        return None if tensor.grad_fn is not None else _constant(tensor)

    def _varies(self, tensor: Tensor) -> bool:
        positions = self._known(tensor)
        return positions is None or not is_constant(positions)


def _constant(tensor: Tensor) -> Positions:
    values = torch.full((), CONSTANT, dtype=torch.float64).expand(tensor.shape)
    return Positions(values, values)


def _order(positions: Positions | None, image_size: tuple[int, int]) -> TokenOrder | str:
    """Return the order of the positions of two images in a tensor, or why it is not certain."""
    if positions is None:
        return "its values cannot be followed to positions of the image"
    sizes = positions.rows.shape
    if not bool((~positions.rows.isnan()).any()):
        return "it holds no position of the image, as a class token alone"
    channels = [axis for axis in range(len(sizes)) if sizes[axis] > 1 and is_same_along(positions, axis)]
    if len(channels) != 1:
        return f"{len(channels)} of its axes could be channels"
    first, columns = (side.select(channels[0], 0).flatten() for side in positions[:2])
    if bool((first.isinf() | columns.isinf()).any()):
        return "some of its tokens mix several positions of the image"
    rows_per_image = len(first) // 2
    numbers = torch.arange(len(first))
    has_position = ~first.isnan()
    images = (first / 2).floor()
    places = numbers[has_position & (images == 0)]
    others = numbers[has_position & (images == 1)]
    if not torch.equal(places + rows_per_image, others):
        return "it does not hold its images one after the other"
    return _grid(first[places], columns[places], places, channels[0], rows_per_image, image_size)


def _grid(
    rows: Tensor, columns: Tensor, places: Tensor, channel: int, per_image: int, image_size: tuple[int, int]
) -> TokenOrder | str:
    """Return the order of tokens whose positions make up a complete regular grid."""
    sides = []
    for values in (rows, columns):
        distinct, number = values.mul(1e6).round().unique(return_inverse=True)
        n, steps = len(distinct), distinct.diff() / 1e6
        # every second of 7 columns makes 4, whose cells reach beyond the border
        covers = n < 2 or 0.8 < float(steps.mean()) * n < 1.35
        if not covers or (n > 2 and bool(((steps / steps.mean() - 1).abs() > 0.25).any())):
            return "its tokens do not cover the image evenly"
        sides.append((n, number))
    (h, row), (w, column) = sides
    cells = row * w + column
    if len(cells) != h * w or len(cells.unique()) != h * w:
        return f"its {len(cells)} tokens do not fill the cells of one grid"
    index = torch.empty(h * w, dtype=torch.long)
    index[cells] = places
    return TokenOrder(channel, per_image, index.reshape(h, w), image_size)
