"""Tables over taps from means over images and kept rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitscope.stats.intervals import Estimate

#: levels of the quantiles of the norms of patch tokens
QUANTILES = np.array([0.0, 0.05, 0.5, 0.95, 1.0])
#: channels of which a tap's result names the numbers
_N_CHANNELS = 5


def numbers(means: Sequence[Estimate], field: str) -> np.ndarray:
    """Return one number per tap; NaN where it is not finite."""
    values = np.array([float(getattr(mean, field)) for mean in means])
    return np.where(np.isfinite(values), values, np.nan)


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray | tuple[np.ndarray, ...]:
    """Return one array of the rows ``(n_images, n)`` of taps or units, or a tuple where their shapes differ."""
    if not rows:
        return np.zeros((0, 0, 0), np.float32)
    return np.stack(rows) if len({part.shape for part in rows}) == 1 else tuple(rows)


def quantiles(norms: np.ndarray) -> np.ndarray:
    """Return the quantiles of all norms of a tap, ``(n_quantiles,)``; NaN where one is not finite."""
    if not norms.size or not np.isfinite(norms).all():
        return np.full(len(QUANTILES), np.nan)
    return np.quantile(norms.astype(np.float64), QUANTILES)


def padded(rows: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Return rows of at most n numbers as a table ``(len(rows), n)``, filled up with NaN."""
    table = np.full((len(rows), n), np.nan)
    for line, values in zip(table, rows):
        values = np.atleast_1d(values)[:n]
        line[: len(values)] = values
    return np.where(np.isfinite(table), table, np.nan)


def largest_channels(peaks: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the channels with the largest magnitudes and these, ``(n_taps, n_channels)`` each."""
    channels = np.full((len(peaks), _N_CHANNELS), -1)
    magnitudes = np.full((len(peaks), _N_CHANNELS), np.nan)
    for tap, mean in enumerate(peaks):
        values = np.atleast_1d(mean.mean)
        if mean.count and np.isfinite(values).all():
            order = np.argsort(-values, kind="stable")[:_N_CHANNELS]
            channels[tap, : len(order)], magnitudes[tap, : len(order)] = order, values[order]
    return channels, magnitudes
