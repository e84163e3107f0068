"""Attention that each token receives: sinks are tokens that receive many times their equal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean, estimate_lists
from vitscope.diagnostics.tokens._token_statistics import KeptRows, gathered_rows
from vitscope.diagnostics.tokens._token_tables import stacked
from vitscope.models.structure.attention_units import AttentionUnit


class AttentionSinks:
    """Attention received by the tokens of one unit: that of the first images, and means over all.

    All values are relative to equal attention: the weight of a key, averaged over heads and queries, times the number of keys.

    Attributes:
        patch: Attention received by each position of the map of keys, kept.
        prefix: Attention received by each prefix token.
        largest: Largest attention received by one token of an image.
        on_prefix: Whether that token is a prefix token.
    """

    def __init__(self, unit: AttentionUnit, norm_images: int | None) -> None:
        self.unit = unit
        self.patch = KeptRows(norm_images)
        self.prefix, self.largest, self.on_prefix = RunningMean(), RunningMean(), RunningMean(answers=True)
        rows, columns = unit.keys.unbind(-1)  # (n_windows, n_keys)
        self._cells = torch.where(rows >= 0, rows * unit.key_grid[1] + columns, -1).flatten()
        self._prefix = unit.prefix_keys
        is_query = (unit.queries[..., 0] >= 0).double()  # (n_windows, n_queries); padding asks for nothing
        self._queries = torch.ones_like(is_query) if unit.n_windows == 1 else is_query

    def add(self, weights: Tensor) -> None:
        """Add a batch's weights ``(B * n_windows, heads, queries, keys)``."""
        received = self._received(weights).flatten(1)  # (B, n_windows * keys)
        columns = (self._cells >= 0).nonzero()[:, 0].to(weights.device)
        cells = self._cells.to(weights.device)[columns]
        n_cells = self.unit.key_grid[0] * self.unit.key_grid[1]
        patch = received.new_zeros(len(received), n_cells).index_add_(1, cells, received[:, columns])
        patch /= torch.bincount(cells, minlength=n_cells).clamp_min(1)  # a position may lie in several windows
        self.patch.add(patch)
        largest = patch.amax(1)
        on_prefix = torch.zeros_like(largest)
        if len(self._prefix):
            prefix = received[:, self._prefix.to(received.device)]
            self.prefix.add(prefix)
            on_prefix = (prefix.amax(1) > largest).to(largest.dtype)
            largest = torch.maximum(largest, prefix.amax(1))
        self.largest.add(largest)
        self.on_prefix.add(on_prefix)

    def _received(self, weights: Tensor) -> Tensor:
        """Return the mean weight of each key, times the number of keys: ``(B, n_windows, keys)``."""
        n_windows, n_keys = self.unit.n_windows, weights.shape[-1]
        if n_windows == 1:
            return weights.mean((1, 2))[:, None] * n_keys
        weights = weights.mean(1).unflatten(0, (-1, n_windows))  # (B, n_windows, queries, keys)
        queries = self._queries.to(weights)[..., None]  # (n_windows, queries, 1)
        # the weights of padding may be NaN: they are chosen away, not multiplied by zero
        sums = torch.where(queries > 0, weights, 0.0).sum(2)
        return sums / queries.sum(1).clamp_min(1) * n_keys


def sink_fields(
    sinks: Sequence[AttentionSinks], taps: Sequence[str], above: Sequence[np.ndarray], n_prefix: int, level: float
) -> dict[str, Any]:
    """Return the fields of the result that tell about attention.

    Args:
        sinks: Sums of each unit.
        taps: Names of the taps.
        above: (n_norm_images, n_tokens) of each tap, whether a patch token is an artefact.
        n_prefix: Number of prefix tokens of the model.
        level: Coverage of the intervals.
    """
    prefix, largest, on_prefix = estimate_lists(
        [[unit.prefix for unit in sinks], [unit.largest for unit in sinks], [unit.on_prefix for unit in sinks]], level
    )
    kept_rows = gathered_rows([unit.patch for unit in sinks])
    received = tuple(np.zeros((0, 0), np.float32) if rows is None else rows for rows in kept_rows)
    on_prefix_tokens = np.full((len(sinks), n_prefix), np.nan)
    for row, mean in zip(on_prefix_tokens, prefix):
        if mean.count:
            row[: len(mean.mean)] = mean.mean[:n_prefix]
    return {
        "attention_units": tuple(unit.unit.name for unit in sinks),
        "attention_depths": np.array([unit.unit.unit.depth for unit in sinks], dtype=float),
        "attention_received": stacked(received),
        "attention_prefix": on_prefix_tokens,
        "attention_artefacts": np.array(
            [_on_artefacts(unit.unit.name, rows, taps, above) for unit, rows in zip(sinks, received)]
        ),
        "sink_ratio": np.array([float(mean.mean) for mean in largest]),
        "sink_ratio_half_width": np.array([float(mean.half_width) for mean in largest]),
        "sink_on_prefix": np.array([float(mean.mean) for mean in on_prefix]),
    }


def _on_artefacts(name: str, received: np.ndarray, taps: Sequence[str], above: Sequence[np.ndarray]) -> float:
    """Return the mean attention received by artefacts of the tap before the unit, NaN where it has none."""
    before = list(taps).index(name) - 1 if name in taps else -1
    if before < 0 or above[before].shape != received.shape or not above[before].any():
        return np.nan
    return float(received[above[before]].mean(dtype=np.float64))
