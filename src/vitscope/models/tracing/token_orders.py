"""Order in which tensors hold the positions of a map, shown by one forward pass with the positions of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.guard.trial_pass import UntraceableError, first_that_runs, observing, trial_images
from vitscope.core.tap import TokenOrder
from vitscope.models.structure.execution import tensors
from vitscope.models.structure.feature_maps import SPATIAL
from vitscope.models.structure.residual_structure import Read
from vitscope.models.tracing.position_recorder import PositionRecorder
from vitscope.models.tracing.positions import Positions, is_same_along


def with_orders(model: nn.Module, reads: Sequence[Read | None], images: Tensor | None = None) -> list[Read | None]:
    """Return the reads; those of tensors whose layout or grid is not known with the order of their tokens.

    The model runs only where there is such a tensor. Arguments are those of `token_orders`.
    """
    has_maps = any(isinstance(module, SPATIAL) for module in model.modules())
    sought = {str(i): read for i, read in enumerate(reads) if read is not None and _needs_order(read, has_maps)}
    orders = token_orders(model, sought, images) if sought else {}
    return [
        _with_order(read, orders.get(str(i), _reason(read))) if read is not None else None
        for i, read in enumerate(reads)
    ]


def _with_order(read: Read, order: TokenOrder | str | None) -> Read:
    """Return a read with an order; without it where it confirms the guessed prefix, whose layout holds for images of any size."""
    if read.guesses_prefix and isinstance(order, TokenOrder) and read.n_prefix is not None:
        rows = torch.arange(order.index.numel()) + read.n_prefix  # the order of rows behind the prefix
        order = None if torch.equal(order.index.flatten(), rows) else order
    return replace(read, order=order)


def _needs_order(read: Read, has_maps: bool) -> bool:
    """Whether the grid of a tensor is not known; ``has_maps``: the model has convolutions or pooling, which may show it."""
    if read.at == "sum" or not read.exact or not read.has_map:
        return False
    if read.guesses_prefix:
        return True
    return read.layout == "unknown" or not read.shows_grid or (read.layout in ("NLC", "NCL", "LNC") and not has_maps)


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

    def observe(first: Tensor) -> dict[str, TokenOrder | str]:
        x = torch.cat((first, first))
        recorder = _Recorder(x, reads)
        with observing(model), recorder.hooks(), recorder:
            model.forward(x)
        orders: dict[str, TokenOrder | str] = dict.fromkeys(reads, "the forward pass does not run it")
        for name, positions in recorder.read_positions.items():
            orders[name] = _order(positions, recorder.size)
        return orders

    try:
        return first_that_runs(trial_images(model, images), observe)
    except UntraceableError:
        return dict.fromkeys(reads, "the model does not run on two images of one size")


class _Recorder(PositionRecorder):
    """Follow the positions of each value, and find the order of those that are read."""

    def __init__(self, images: Tensor, reads: Mapping[str, Read]) -> None:
        super().__init__(images)
        self.reads = reads
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
            self.read_positions[name] = self.positions_of(value)


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
