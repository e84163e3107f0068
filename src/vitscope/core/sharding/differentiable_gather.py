"""Gather the shards of a weight as often differentiable operations: the transpose of a gather is a sum that is scattered.

Let the loss be the sum of all ranks' shares, each a function of the whole weight. The gradient of a rank's shard is then the sum
over ranks of its rows of their gradients, which is what the gather's backward pass computes. That pass is linear, and its
transpose is the gather, so that second derivatives are exact too. All ranks have to make the same passes in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitscope.runtime import distributed


@dataclass(frozen=True)
class ShardLayout:
    """Place of a rank's shard in the whole weight: ranks hold equal numbers of rows in turn, the last ones fewer or none.

    Attributes:
        shape: Shape of the whole weight.
        axis: Axis along which it is cut.
        rank: Rank of this process in the group.
        world: Number of processes of the group.
        group: The processes that hold shards; None for all.
    """

    shape: torch.Size
    axis: int
    rank: int
    world: int
    group: Any = None

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard."""
        return -(-self.shape[self.axis] // self.world)

    @property
    def start(self) -> int:
        """Number of the first row of this rank."""
        return min(self.rank * self.rows_per_shard, self.shape[self.axis])

    @property
    def n_rows(self) -> int:
        """Rows of this rank."""
        return min(self.rows_per_shard, self.shape[self.axis] - self.start)

    def local_part(self, whole: Tensor) -> Tensor:
        """Return this rank's rows of a tensor of the whole weight's shape, as a view."""
        return whole.narrow(self.axis, self.start, self.n_rows)


def gather(shard: Tensor, layout: ShardLayout) -> Tensor:
    """Return the whole weight from the shards of all ranks; differentiable any number of times.

    Args:
        shard: This rank's rows, ``(n_rows, ...)`` along the axis of the layout.
        layout: Place of the shard in the whole weight.
    """
    return _Gather.apply(shard, layout)


class _Gather(torch.autograd.Function):
    """The rows of all ranks, joined; its transpose is `_SumScattered`."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, layout: ShardLayout) -> Tensor:
        ctx.layout = layout
        rows = shard.detach().movedim(layout.axis, 0)  # (n_rows, ...)
        padded = rows.new_zeros(layout.rows_per_shard, *rows.shape[1:])  # collectives take equal numbers of rows
        padded[: len(rows)] = rows
        joined = distributed.gather_rows(padded, layout.group)  # (world * rows_per_shard, ...)
        return joined[: layout.shape[layout.axis]].movedim(0, layout.axis).contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SumScattered.apply(g, ctx.layout), None


class _SumScattered(torch.autograd.Function):
    """This rank's rows of the sum over ranks; its transpose is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, layout: ShardLayout) -> Tensor:
        ctx.layout = layout
        rows = whole.detach().movedim(layout.axis, 0)  # (all rows, ...)
        padded = rows.new_zeros(layout.world * layout.rows_per_shard, *rows.shape[1:])
        padded[: len(rows)] = rows
        summed = distributed.scatter_summed_rows(padded, layout.group)  # (rows_per_shard, ...)
        return summed[: layout.n_rows].movedim(0, layout.axis).contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Gather.apply(g, ctx.layout), None
