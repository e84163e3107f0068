"""Largest rise of the loss within a radius, by projected gradient ascent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.probe import Probe
from vitscope.core.weight_space import guarded_evaluation
from vitscope.diagnostics.landscape._direction_options import Source
from vitscope.linalg.weights.directions import (
    Direction,
    filter_parameters,
    moving,
    normalize,
    project,
    random_direction,
    scale,
)
from vitscope.linalg.weights.effective_weights import canonical_names, pruning_masks
from vitscope.linalg.weights.weight_space_walk import points_in_plane
from vitscope.runtime import stop_flag
from vitscope.runtime.resumable_map import Partial, Row, map_resumably


def worst_rises(
    probe: Probe,
    source: Source,
    radii: Sequence[float],
    radii_mask: np.ndarray,
    n_steps: int,
    n_starts: int,
    dtype: torch.dtype | None,
    partial: Partial | None,
) -> np.ndarray:
    """Return the largest rise met from each start (n_radii, n_starts), NaN where it is not wanted.

    ``dtype`` is None for the model's own, or one of full precision.
    """
    rises = np.full((len(radii), n_starts), np.nan)
    keys = [(i, start) for i in np.flatnonzero(radii_mask).tolist() for start in range(n_starts)] if n_steps else []
    with guarded_evaluation(probe, dtype=dtype) as (model, evaluate_current_weights):

        def compute(key: tuple[int, int]) -> Row:
            i, start = key
            return {
                "rise": -evaluate_current_weights()["nll"] + _ascended(probe, model, source, radii[i], start, n_steps)
            }

        def name(key: tuple[int, int]) -> str:
            return f"worst {radii[key[0]]!r} from start {key[1]}"

        values = map_resumably(keys, compute, name=name, partial=partial, description="sharpness, worst case")
    for key, row in zip(keys, values):
        rises[key] = row["rise"]
    return rises


def _ascended(probe: Probe, model: nn.Module, source: Source, radius: float, start: int, n_steps: int) -> float:
    """Return the largest nll met by projected gradient ascent; the weights are back afterwards."""
    parameters, filters, masks = probe.parameters(), filter_parameters(model), pruning_masks(model)
    moved = moving(parameters, source.ignored)
    # a stream of its own: the starts must not be directions of the mean
    offset = random_direction(moved, source.seed, -1 - start, canonical_names(model))
    offset = normalize(offset, parameters, source.scaling, filters, masks)
    offset = scale(offset, radius)
    # norms that scale and bound are those of the weights on entry, which move while this runs
    origin = {name: p.detach().clone() for name, p in moved.items()}
    best = -np.inf
    with points_in_plane(moved, None, offset) as move:
        for step in range(n_steps + 1):
            move(0.0, 1.0)
            nll, gradient = _nll_and_gradient(probe, model, moved)
            best = max(best, nll) if np.isfinite(nll) else np.inf
            if step == n_steps or not np.isfinite(nll):
                break
            normalize(gradient, origin, source.scaling, filters, masks)
            for name, d in offset.items():
                d.add_(gradient[name], alpha=radius * (1 - step / n_steps))
            project(offset, origin, radius, source.scaling, filters, masks)
    return float(best)


def _nll_and_gradient(probe: Probe, model: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[float, Direction]:
    names, leaves = list(parameters), list(parameters.values())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses = []  # added up on the device: a number read for each batch would make the host wait for it
    with torch.enable_grad():
        for x, y in probe.iter_batches():
            stop_flag.check()
            loss = probe.objective.data_loss(model(x), y, "sum") / probe.n_labeled
            losses.append(loss.detach().double())
            for name, g in zip(names, torch.autograd.grad(loss, leaves, materialize_grads=True)):
                total[name].add_(g)
    return float(sum(losses)), total
