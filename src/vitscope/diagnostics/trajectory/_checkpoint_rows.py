"""The numbers behind a trajectory: of the checkpoints as they were saved, and of points in their plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import Checkpoints, guarded_evaluation, select_checkpoints
from vitscope.linalg.weights.directions import Direction
from vitscope.linalg.weights.weight_space_walk import points_in_plane, points_on_segment
from vitscope.runtime.resumable_map import Partial, Row, map_resumably


def checkpoint_rows(
    probe: Probe,
    labels: Sequence[str],
    checkpoints: Checkpoints,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
) -> list[Row]:
    """Measure each checkpoint as it was saved, buffers included."""
    with guarded_evaluation(probe, dtype=dtype, bn=bn) as (model, evaluate_current_weights):

        def compute(label: str) -> Row:
            _, state = next(select_checkpoints(checkpoints, [label]))
            tensors = dict(model.named_parameters()) | {name: v for name, v in model.named_buffers() if name in state}
            with points_on_segment(tensors, state, state) as move:
                move(0.0)
                return evaluate_current_weights()

        def name(label: str) -> str:
            return f"checkpoint {label}"

        return map_resumably(labels, compute, name=name, partial=partial, description="checkpoints")


def plane_rows(
    probe: Probe,
    first: Direction,
    second: Direction,
    points: Sequence[tuple[float, float]],
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
) -> list[Row]:
    """Measure points of the plane through the model's weights, with the model's buffers."""
    with guarded_evaluation(probe, dtype=dtype, bn=bn) as (model, evaluate_current_weights):
        parameters = dict(model.named_parameters())
        with points_in_plane(parameters, first, second) as move:

            def compute(point: tuple[float, float]) -> Row:
                move(*point)
                return evaluate_current_weights()

            def name(point: tuple[float, float]) -> str:
                return f"plane {point[0]!r},{point[1]!r}"

            return map_resumably(points, compute, name=name, partial=partial, description="trajectory's plane")
