"""Evaluation at points on lines through the weights, one line after another, for slices and sharpness."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import check_movable, guarded_evaluation
from vitscope.diagnostics.landscape._axes import checkpoint_differences, direction
from vitscope.diagnostics.landscape._direction_options import Source
from vitscope.linalg.weights.directions import norm
from vitscope.linalg.weights.weight_space_walk import Move, SquaredNorms, points_in_plane, squared_norms
from vitscope.runtime.resumable_map import Partial, Row, map_resumably

LineKey = tuple[int, float]


def measure_lines(
    probe: Probe,
    source: Source,
    keys: Sequence[LineKey],
    *,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
    description: str,
) -> list[Row]:
    """Return nll, accuracy, ece, both L2 forms and the direction's norm at each (direction number, coordinate).

    Keys of one direction should be neighbors: a direction is made when the first of its points is measured.

    Raises:
        ValueError: Directions that do not fit the model.
    """
    check_movable(probe)
    _, differences = checkpoint_differences(probe, source)
    first = direction(probe, source, 0) if source.kind == "gradient" else None
    everything, decay = probe.model, probe.objective.weight_decay
    with guarded_evaluation(probe, dtype=dtype, bn=bn) as (_, evaluate_current_weights), ExitStack() as line:
        current: tuple[int, Move, SquaredNorms, float] | None = None

        def begin(index: int) -> tuple[int, Move, SquaredNorms, float]:
            line.close()  # the weights are back: directions are scaled by them
            d = first if first is not None and index == 0 else direction(probe, source, index, differences, first)
            norms = squared_norms(dict(everything.named_parameters()), None, d)
            return index, line.enter_context(points_in_plane(probe.parameters(), None, d)), norms, norm(d)

        def compute(key: LineKey) -> Row:
            return compute_line([key])[0]

        def compute_line(keys_of_line: Sequence[LineKey]) -> list[Row]:
            nonlocal current
            index = keys_of_line[0][0]
            if current is None or current[0] != index:
                current = begin(index)
            _, move, norms, length = current
            measured = evaluate_current_weights.at(
                [functools.partial(move, 0.0, coordinate) for _, coordinate in keys_of_line]
            )
            zero = np.zeros(())
            rows = []
            for (_, coordinate), row in zip(keys_of_line, measured):
                distance = np.asarray(coordinate)
                half_sq = float(norms.half_sq(decay, zero, distance))
                sum_norm = float(norms.sum_norm(decay, zero, distance))
                rows.append({**row, "l2_half_sq": half_sq, "l2_sum_norm": sum_norm, "direction_norm": length})
            return rows

        return map_resumably(
            keys, compute, name=_name, partial=partial, description=description, compute_group=compute_line,
            group=lambda key: key[0], group_size=evaluate_current_weights.group_size,
        )  # fmt: skip


def _name(key: LineKey) -> str:
    return f"direction {key[0]}: {key[1]!r}"
