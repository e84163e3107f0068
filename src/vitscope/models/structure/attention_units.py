"""Units whose attention weights can be read, and the positions of their queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.probe import Probe
from vitscope.models.structure.attention_weights import AttentionCall, reading_calls
from vitscope.models.structure.residual_units import Unit
from vitscope.models.structure.residual_units import units as units_of
from vitscope.models.tracing.attention_positions import AttentionPositions, attention_positions
from vitscope.runtime.errors import StructureError

#: parts of the sides of an image that count as one position
_RESOLUTION = 1e-6


@dataclass(frozen=True, eq=False)
class AttentionUnit:
    """A residual unit whose attention weights can be read, with the positions of its tokens.

    Global attention has one window, the whole map. The positions hold for images of ``image_size``.

    Attributes:
        unit: The residual unit.
        module: The module in which it attends.
        n_heads: Number of heads.
        queries: (n_windows, n_queries, 2) row and column of each query in ``query_grid``; -1 for a token without a position,
            which is a prefix token or padding.
        keys: (n_windows, n_keys, 2) row and column of each key in ``key_grid``; -1 likewise.
        query_grid: Rows and columns of the map of queries.
        key_grid: Rows and columns of the map of keys, which may be coarser.
        image_size: (H, W) of the images.
        is_transposed: Whether the model has its weights as (..., keys, queries).
        order: (n_windows * n_joined * n_heads,) number of each window's heads among the attention maps of an image in the model.
        n_joined: Maps of the model that make one of a head, as of a network that has the rows of its queries on an axis of their
            own: they attend to the same keys, and their queries follow each other.
    """

    unit: Unit
    module: nn.Module
    n_heads: int
    queries: Tensor
    keys: Tensor
    query_grid: tuple[int, int]
    key_grid: tuple[int, int]
    image_size: tuple[int, int]
    is_transposed: bool
    order: Tensor
    n_joined: int = 1

    @property
    def name(self) -> str:
        """Name of the residual unit."""
        return self.unit.name

    @property
    def n_windows(self) -> int:
        """Attention windows of an image; 1 for global attention."""
        return len(self.queries)

    @property
    def prefix_queries(self) -> Tensor:
        """Numbers of the queries that are prefix tokens; none in windows, where a query without a position is padding."""
        return self._prefix_tokens(self.queries)

    @property
    def prefix_keys(self) -> Tensor:
        """Numbers of the keys that are prefix tokens, likewise."""
        return self._prefix_tokens(self.keys)

    def _prefix_tokens(self, tokens: Tensor) -> Tensor:
        """Return the numbers of the prefix tokens among (n_windows, n, 2) tokens.

        They stand in front of the patches, in networks of one's own also behind them. Other tokens without a position are
        padding.
        """
        without_position = (tokens[0, :, 0] < 0).nonzero()[:, 0]
        if self.n_windows > 1:
            return without_position[:0]
        if len(without_position) in (tokens.shape[1], self.unit.n_prefix):
            return without_position
        return without_position[without_position == torch.arange(len(without_position))]

    def from_source(self, source: Tensor) -> Tensor:
        """Return the model's own weights, or a gradient by them, as `arranged` does."""
        return self.arranged(source.transpose(-2, -1) if self.is_transposed else source)

    def arranged(self, weights: Tensor) -> Tensor:
        """Return weights (..., queries, keys) of the model as (B * n_windows, heads, queries, keys).

        Raises:
            StructureError: Weights of other images than those for which the positions hold.
        """
        n_queries, n_keys = self.queries.shape[1] // self.n_joined, self.keys.shape[1]
        maps = weights.reshape(-1, *weights.shape[-2:])  # (B * n_windows * heads, queries, keys)
        if maps.shape[1:] != (n_queries, n_keys) or len(maps) % len(self.order):
            height, width = self.image_size
            raise StructureError(
                self.name,
                f"its attention was found for images of {height}x{width}, {n_queries} queries and {n_keys} keys, received "
                f"{maps.shape[1]} queries and {maps.shape[2]} keys",
                "pass images of one size",
            )
        maps = maps.unflatten(0, (-1, len(self.order)))  # (B, n_windows * heads, queries, keys)
        if not torch.equal(self.order, torch.arange(len(self.order))):
            maps = maps[:, self.order.to(maps.device)]
        maps = maps.reshape(-1, self.n_joined, self.n_heads, n_queries, n_keys)
        return maps.transpose(1, 2).flatten(2, 3)  # (B * n_windows, heads, queries, keys)


def attention_units(
    model: nn.Module, images: Any = None, units: Sequence[Unit] | None = None
) -> tuple[list[AttentionUnit], dict[str, str]]:
    """Return the units whose attention weights can be read, by depth, and why each other one's cannot, by name.

    One forward pass of two images shows where each attends and follows the positions of its queries and keys, in global,
    windowed, shifted and grid attention, also with fewer keys. A network without attention has none, and no reasons.

    Args:
        model: The model.
        images: (B, C, H, W) that the model takes, or the inputs of a batch that hold them, of which the first is used; None to
            try the sizes that the model states.
        units: The network's residual units; None for those that are found.

    Raises:
        ValueError: A model in which no units are found, as `vitscope.models.structure.residual_units.units`.
    """
    model = unwrapped(model)
    attending = [unit for unit in (units_of(model, images) if units is None else units) if unit.kind == "msa"]
    if not attending:
        return [], {}
    modules = {unit.name: _owner(model, unit) for unit in attending}
    shared = [module for module in modules.values() if list(modules.values()).count(module) > 1]
    owners = {module: name for name, module in modules.items() if module not in shared}
    observed, image_size = attention_positions(model, owners, images)
    readable, reasons = [], {}
    for unit in attending:
        calls = observed.get(unit.name, [])
        if modules[unit.name] in shared:
            reasons[unit.name] = "its attention cannot be told apart from that of another unit"
        elif len(calls) != 1:
            several = "its module computes attention several times per image"
            reasons[unit.name] = several if calls else "its attention weights cannot be read"
        else:
            try:
                readable.append(_unit(unit, modules[unit.name], calls[0], image_size))
            except _UncertainPositionsError as error:
                reasons[unit.name] = str(error)
    return readable, reasons


#: units and reasons by probe, see `attention_units_of`
_found_by_probe: MutableMapping[Probe, tuple[list[AttentionUnit], dict[str, str]]] = WeakKeyDictionary()


def attention_units_of(probe: Probe) -> tuple[list[AttentionUnit], dict[str, str]]:
    """Return `attention_units` of a probe's model and first images, found once a probe: measures of a shared pass use them too.

    Raises:
        ValueError: As `attention_units`.
    """
    if probe not in _found_by_probe:
        with probe.calling():
            _found_by_probe[probe] = attention_units(probe.model, probe.first_images())
    units, reasons = _found_by_probe[probe]
    return list(units), dict(reasons)


@contextmanager
def reading_attention_units(
    units: Sequence[AttentionUnit], fn: Callable[[int, AttentionUnit, Tensor], None], explicit: bool = False
) -> Iterator[None]:
    """Call ``fn(index, unit, weights)`` for each unit as it attends in a forward pass.

    ``weights`` are (B * n_windows, heads, queries, keys), windows of an image one after the other, in float32 at least; rows
    sum to 1. The model's output does not change.

    Args:
        units: The result of `attention_units` for images of the same size.
        fn: Function that takes the weights, which the model may use after it.
        explicit: Whether the output is computed from the weights, so that it can be differentiated by them; then ``fn`` takes
            them as the model has them, before `AttentionUnit.from_source`, and the output changes by rounding.
    """

    def read(index_and_unit: tuple[int, AttentionUnit], call: AttentionCall) -> None:
        index, unit = index_and_unit
        if explicit:
            assert call.source is not None
            fn(index, unit, call.source)
        else:
            fn(index, unit, unit.arranged(call.weights()))

    with reading_calls({unit.module: (i, unit) for i, unit in enumerate(units)}, read, explicit):
        yield


def _owner(model: nn.Module, unit: Unit) -> nn.Module:
    """Return the module in which a unit attends: its attention module, or that of its name, or its block."""
    if unit.attention is not None:
        return unit.attention
    return dict(model.named_modules()).get(unit.name, unit.block)


def _unit(
    unit: Unit, module: nn.Module, positions: AttentionPositions | str, image_size: tuple[int, int]
) -> AttentionUnit:
    """Return a unit with the positions of its tokens.

    Raises:
        _UncertainPositionsError: They are not certain.
    """
    if isinstance(positions, str):
        raise _UncertainPositionsError(positions)
    queries, keys = (  # (2 * maps of an image, tokens, 2)
        side.reshape(-1, *side.shape[-2:]) for side in (positions.queries, positions.keys)
    )
    if len(queries) != len(keys) or len(queries) % 2:
        raise _UncertainPositionsError("its queries and keys are not of the same images")
    tokens = torch.cat((queries, keys), dim=1)
    if bool(tokens.isinf().any()):
        raise _UncertainPositionsError("some of its tokens mix several positions of the image")
    first, second = tokens.chunk(2)
    # rows of the second image are greater by two
    if not torch.allclose(first + torch.tensor([2.0, 0.0]).to(first), second, rtol=0, atol=_RESOLUTION, equal_nan=True):
        raise _UncertainPositionsError("it does not hold its images one after the other")
    if bool((first[..., 0] >= 2).any()):
        raise _UncertainPositionsError("its maps mix several images")
    order, n_windows = _windows(first)
    n_heads = len(order) // n_windows
    per_window = first[order[::n_heads]]  # (n_windows, queries + keys, 2)
    query_places, key_places = per_window[:, : queries.shape[1]], per_window[:, queries.shape[1] :]
    n_joined = 1
    if torch.allclose(key_places, key_places[:1].expand_as(key_places), rtol=0, atol=_RESOLUTION, equal_nan=True):
        n_joined, query_places, key_places = n_windows, query_places.reshape(1, -1, 2), key_places[:1]
    query_cells, query_grid = _cells(query_places)
    key_cells, key_grid = _cells(key_places)
    return AttentionUnit(
        unit, module, n_heads, query_cells, key_cells, query_grid, key_grid, image_size, positions.is_transposed, order,
        n_joined,
    )  # fmt: skip


class _UncertainPositionsError(Exception):
    """The positions of an attention's tokens are not certain; the text says why."""


def _windows(tokens: Tensor) -> tuple[Tensor, int]:
    """Return the numbers of attention maps (n, tokens, 2) by window and head, and the number of windows.

    Maps whose tokens have the same positions are heads of one window.

    Raises:
        _UncertainPositionsError: Their number differs among windows.
    """
    rounded = (tokens / _RESOLUTION).round().nan_to_num(nan=-1.0).flatten(1)
    _, numbers, counts = rounded.unique(dim=0, return_inverse=True, return_counts=True)
    if len(counts.unique()) != 1:
        raise _UncertainPositionsError("its windows have different numbers of heads")
    first_maps = torch.stack([(numbers == number).nonzero()[0, 0] for number in range(len(counts))])
    windows = [(numbers == numbers[first]).nonzero()[:, 0] for first in first_maps.sort().values]
    return torch.cat(windows), len(counts)


def _cells(positions: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return row and column of each token (n_windows, n, 2) in their grid, and its size.

    Raises:
        _UncertainPositionsError: They make up no regular grid.
    """
    has_position = ~positions[..., 0].isnan()
    cells = torch.full(positions.shape, -1, dtype=torch.long)
    sizes = []
    for side in (0, 1):
        values = positions[..., side][has_position]
        distinct, numbers = (values / _RESOLUTION).round().unique(return_inverse=True)
        steps = distinct.diff()
        if len(distinct) > 2 and bool(((steps / steps.mean() - 1).abs() > 0.25).any()):
            raise _UncertainPositionsError("its tokens do not cover the image evenly")
        cells[..., side][has_position] = numbers
        sizes.append(len(distinct))
    return cells, (sizes[0], sizes[1])
