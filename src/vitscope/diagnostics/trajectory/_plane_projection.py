"""The numbers behind a trajectory: of the checkpoints as they were saved, and of points in their plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import Checkpoints, Partial, Row, chosen, rows, standing
from vitscope.linalg.weights.directions import Direction
from vitscope.linalg.weights.weight_space_walk import between, walked


def checkpoint_rows(
    probe: Probe,
    labels: Sequence[str],
    checkpoints: Checkpoints,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
) -> list[Row]:
    """Measure each checkpoint as it was saved, buffers included."""
    with standing(probe, dtype=dtype, bn=bn) as (model, here):

        def compute(label: str) -> Row:
            _, state = next(chosen(checkpoints, [label]))
            tensors = dict(model.named_parameters()) | {name: v for name, v in model.named_buffers() if name in state}
            with between(tensors, state, state) as move:
                move(0.0)
                return here()

        def name(label: str) -> str:
            return f"checkpoint {label}"

        return rows(labels, compute, name=name, partial=partial, description="checkpoints")


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
    with standing(probe, dtype=dtype, bn=bn) as (model, here):
        parameters = dict(model.named_parameters())
        with walked(parameters, first, second) as move:

            def compute(point: tuple[float, float]) -> Row:
                move(*point)
                return here()

            def name(point: tuple[float, float]) -> str:
                return f"plane {point[0]!r},{point[1]!r}"

            return rows(points, compute, name=name, partial=partial, description="trajectory's plane")
