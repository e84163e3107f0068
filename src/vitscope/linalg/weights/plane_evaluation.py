"""Evaluation of a model at points of a plane through its weights, shared out among the ranks and resumable."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.directions import Direction
from vitscope.linalg.weights.weight_space_walk import points_in_plane
from vitscope.runtime.resumable_map import Partial, Row, map_resumably


def plane_rows(
    probe: Probe,
    first: Direction,
    second: Direction,
    points: Sequence[tuple[float, float]],
    *,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
    row_prefix: str,
    description: str,
) -> list[Row]:
    """Return nll, accuracy and ece at the weights ``w + a * first + b * second`` of each point ``(a, b)``, buffers unmoved.

    Args:
        probe: The model, whose weights are back afterwards, and its batches.
        first: The first direction, see `vitscope.linalg.weights.weight_space_walk.set_aside`.
        second: The second direction.
        points: Coordinates in units of the directions; neighbors with one ``a`` cost one pass over the weights.
        dtype: Type of the evaluation; None for the model's own.
        bn: ``eval`` or ``recalibrate``, see `vitscope.core.weight_space.guarded_evaluation`.
        partial: Finished rows.
        row_prefix: First part of a row's name in ``partial``, before the point's coordinates.
        description: The text beside the progress.

    Raises:
        Interrupted: A stop was requested; the finished rows are stored.
    """
    with guarded_evaluation(probe, dtype=dtype, bn=bn) as (model, evaluate_current_weights):
        parameters = dict(model.named_parameters())
        with points_in_plane(parameters, first, second) as move:

            def compute(point: tuple[float, float]) -> Row:
                move(*point)
                return evaluate_current_weights()

            def compute_row(row: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
                return evaluate_current_weights.at([functools.partial(move, *point) for point in row])

            def name(point: tuple[float, float]) -> str:
                return f"{row_prefix}{point[0]!r},{point[1]!r}"

            return map_resumably(
                points, compute, name=name, partial=partial, description=description, compute_group=compute_row,
                group=lambda point: point[0], group_size=evaluate_current_weights.group_size,
            )  # fmt: skip
