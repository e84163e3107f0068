"""Evaluation of the checkpoints of a trajectory as they were saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import Checkpoints, guarded_evaluation, select_checkpoints
from vitscope.linalg.weights.weight_space_walk import points_on_segment
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
