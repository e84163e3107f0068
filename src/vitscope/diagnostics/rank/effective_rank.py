"""Effective rank and participation ratio of the features of each layer, by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.tap import Tap, tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.linalg.feature_moments import FeatureMoments, moments_of
from vitscope.runtime import distributed
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class EffectiveRankResult(Result, coordinates=TAP_COORDINATES):
    """Features are the channel vectors at positions of the maps; their covariance is over images and positions.

    Attributes:
        taps: (n_taps,) names, by depth.
        kinds: (n_taps,) such as ``msa``.
        stages: (n_taps,) from 0, the stem.
        depths: (n_taps,) from 0 to 1.
        channels: (n_taps,) the largest rank there can be.
        effective_rank: (n_taps,) exp of the entropy of the normalized singular values; NaN where the features do not vary
            or are not finite.
        participation_ratio: (n_taps,) squared sum over sum of squares of the covariance's eigenvalues; NaN likewise.
        spectrum: (n_taps, channels) one array per tap: eigenvalues of the covariance, descending, summing to 1; NaN likewise.
        n_samples: (n_taps,) feature vectors: images times positions.
        n_images: Images used.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    channels: np.ndarray
    effective_rank: np.ndarray
    participation_ratio: np.ndarray
    spectrum: tuple[np.ndarray, ...]
    n_samples: np.ndarray
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return both at the last tap, and the mean effective rank as a share of the channels."""
        share = self.effective_rank / self.channels
        scalars = {
            "effective_rank_last": float(self.effective_rank[-1]),
            "participation_ratio_last": float(self.participation_ratio[-1]),
            "effective_rank_share": float(share[np.isfinite(share)].mean()) if np.isfinite(share).any() else np.nan,
        }
        return {name: value for name, value in scalars.items() if np.isfinite(value)}


def accumulate(probe: Probe, *, positions: PositiveInt | None = 16) -> _Sums:
    """Return what `effective_rank` keeps between batches; arguments and errors are its own."""
    if positions is not None and positions < 1:
        raise ValueError(f"Expected at least one position, received {positions}.")
    probe.check_taps()
    return _Sums(probe, positions)


@declares_cost(feature_pass_cost(accumulate))
@shares_pass(accumulate)
@record_options
def effective_rank(probe: Probe, *, positions: PositiveInt | None = 16) -> EffectiveRankResult:
    """Measure the rank of the features at every tap in one forward pass per batch, from running sums alone.

    With covariance eigenvalues l_i and singular values s_i = sqrt(l_i): effective rank ``exp(-sum p_i ln p_i)``, ``p_i = s_i /
    sum s`` (Roy and Vetterli 2007), and participation ratio ``(sum l)^2 / sum l^2`` (Gao et al. 2017). Both are at most the
    number of samples less one, so images should number several times the channels over the positions.

    Args:
        probe: Model, images and taps.
        positions: Largest number of positions of a map, drawn once, to keep the sums cheap; None for all.

    Raises:
        ValueError: A probe without taps, fewer than one position, fewer than two feature vectors, or a tap that was not reached.
    """
    sums = accumulate(probe, positions=positions)
    run_feature_pass(probe, [sums], "effective rank")
    return sums.result()


class _Sums:
    """Sums that are kept between batches: the moments of each tap's feature vectors."""

    def __init__(self, probe: Probe, positions: int | None) -> None:
        self.probe, self.positions = probe, positions
        self.moments = [FeatureMoments() for _ in probe.taps]
        self.n_images = 0

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        self.moments[index].add(_samples(x, self.positions))

    def close_batch(self, number: int, n_images: int) -> None:
        """Count the batch's images."""
        self.n_images += n_images

    def result(self) -> EffectiveRankResult:
        """Return the ranks of the covariances."""
        taps = self.probe.taps
        states = distributed.gather_objects([m.state() for m in self.moments])
        totals = [_merged(shares) for shares in zip(*states)]
        for tap, (n, _) in zip(taps, totals):
            if n < 2:
                raise ValueError(f"Expected at least two feature vectors at tap {tap.name!r}, received {n}.")
        ranks = [_ranks(values) for _, values in totals]
        _say_what_is_null(taps, totals)
        return EffectiveRankResult(
            **tap_fields(taps),
            channels=np.array([len(values) for _, values in totals]),
            effective_rank=np.array([rank for rank, _, _ in ranks]),
            participation_ratio=np.array([ratio for _, ratio, _ in ranks]),
            spectrum=tuple(spectrum for _, _, spectrum in ranks),
            n_samples=np.array([n for n, _ in totals]),
            n_images=sum(distributed.gather_objects(self.n_images)),
            card=self.probe.card(),
        )


def _samples(features: Tensor, positions: int | None) -> Tensor:
    """Return feature vectors ``(B * n, C)`` from a map ``(B, C, h, w)``."""
    vectors = features.flatten(2).transpose(1, 2)  # (B, h * w, C)
    n = vectors.shape[1]
    if positions is not None and positions < n:
        # drawn once and for all: equal strides would fall on a few columns of the map
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:positions]
        vectors = vectors[:, drawn.to(vectors.device)]
    return vectors.reshape(-1, vectors.shape[2])


def _merged(states: Sequence[tuple]) -> tuple[int, np.ndarray]:
    """Return the number of samples and the eigenvalues of their covariance ``(C,)``, descending, over all ranks.

    Zero where the samples agree up to the rounding of their own dtype; NaN where they are not finite.
    """
    total = FeatureMoments()
    for n, mean, scatter, _, _ in states:
        if n:
            total.merge(n, torch.from_numpy(mean), torch.from_numpy(scatter))
    waiting_rows = [waiting for *_, waiting, _ in states if waiting is not None]
    rows = np.concatenate(waiting_rows) if waiting_rows else None
    if rows is not None and total.scatter is None and len(rows) < rows.shape[1]:
        mean = rows.mean(axis=0)
        centered = rows - mean
        matrix, n, channels = centered @ centered.T, len(rows), rows.shape[1]  # the same eigenvalues but for zeros
    else:
        if rows is not None:
            total.merge(*moments_of(torch.from_numpy(rows)))
        if total.mean is None or total.scatter is None:
            return 0, np.zeros(0)
        mean, matrix, n, channels = total.mean.numpy(), total.scatter.numpy(), total.n, len(total.mean)
    spread, common = float(matrix.trace()), n * float(mean @ mean)
    eps = max(state[-1] for state in states)
    if not np.isfinite(spread):
        return n, np.full(channels, np.nan)
    if spread <= eps**2 * (spread + common):
        return n, np.zeros(channels)
    values = torch.linalg.eigvalsh(torch.from_numpy(matrix)).flip(0).numpy() / max(n - 1, 1)
    return n, np.pad(values, (0, channels - len(values)))


def _ranks(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return effective rank, participation ratio and the normalized spectrum of eigenvalues ``(C,)``, descending."""
    # rounding leaves eigenvalues of this size where there are none
    values = np.where(values > len(values) * np.finfo(np.float64).eps * max(values[0], 0), values, values * 0)
    if not values.sum() > 0:
        return np.nan, np.nan, np.full(len(values), np.nan)
    p = np.sqrt(values) / np.sqrt(values).sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    return float(np.exp(entropy)), float(values.sum() ** 2 / (values**2).sum()), values / values.sum()


def _say_what_is_null(taps: Sequence[Tap], totals: Sequence[tuple[int, np.ndarray]]) -> None:
    reasons = {}
    for tap, (_, values) in zip(taps, totals):
        if not np.isfinite(values).all():
            reasons[tap.name] = "its activations are not finite"
        elif not values.any():
            reasons[tap.name] = "its features do not vary"
    warn_nulls("effective_rank", reasons)
