"""Oversmoothing by depth: similarity of tokens (Dong et al. 2021), and of attention (Park et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.running_mean import RunningMean, estimate_lists
from vitscope.core.tap import Tap, tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.tokens._attention_collapse import AttentionCollapse, comparable_groups, layer_cosines
from vitscope.diagnostics.tokens._attention_units import readable_units
from vitscope.diagnostics.tokens._smoothness import mean_cosine, rank1_residual
from vitscope.diagnostics.tokens._token_tables import numbers
from vitscope.models.structure.attention_units import AttentionUnit
from vitscope.runtime import distributed
from vitscope.runtime.value_ranges import OpenUnitInterval
from vitscope.stats.intervals import Estimate, check_level, few_images

#: norms of the rank-1 residual
NORMS = ("frobenius", "composite")


@dataclass(frozen=True)
class OversmoothingResult(
    Result,
    coordinates={
        "tap": "taps",
        "kind": "kinds",
        "stage": "stages",
        "depth": ("depths", "attention_depths"),
        "unit": "attention_units",
    },
):
    """Means over images; half widths are those of t-intervals over images, NaN with fewer than 128. NaN is null.

    Attributes:
        taps: (n_taps) names in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        map_sizes: (n_taps, 2) height and width.
        cosine: (n_taps,) mean cosine over all pairs of different patch tokens, or positions, of an image.
        cosine_half_width: (n_taps,) half its interval.
        rank1_residual: (n_taps,) distance of an image's tokens from their mean token, over their norm: 0 if they are equal.
        rank1_residual_half_width: (n_taps,) half its interval.
        norm: Norm of the residual: frobenius or composite.
        attention_units: (n_units) names of the units whose attention could be read; none in a ConvNet.
        attention_depths: (n_units,) normalized depth among all units of the model.
        nmi: (n_units,) normalized mutual information of query and key positions in [0, 1], mean over heads.
        nmi_half_width: (n_units,) half its interval.
        head_nmi: (n_units, n_heads) of each head; one array per unit where the numbers of heads differ.
        head_similarity: (n_units,) mean cosine of the attention of each pair of heads; NaN for one head.
        head_similarity_half_width: (n_units,) half its interval.
        layer_similarity: (n_units, n_other_units) cosine of the attention of two units, mean over heads; NaN where their tokens
            or windows have different positions.
        layer_similarity_half_width: (n_units, n_other_units) half their intervals.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    map_sizes: np.ndarray
    cosine: np.ndarray
    cosine_half_width: np.ndarray
    rank1_residual: np.ndarray
    rank1_residual_half_width: np.ndarray
    norm: str
    attention_units: tuple[str, ...]
    attention_depths: np.ndarray
    nmi: np.ndarray
    nmi_half_width: np.ndarray
    head_nmi: np.ndarray | tuple[np.ndarray, ...]
    head_similarity: np.ndarray
    head_similarity_half_width: np.ndarray
    layer_similarity: np.ndarray
    layer_similarity_half_width: np.ndarray
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the cosine and the rank-1 residual of the last tap that has them, and the last unit's attention."""
        values = {"cosine_last": _last(self.cosine), "rank1_residual_last": _last(self.rank1_residual)}
        if len(self.attention_units):
            values |= {"nmi_last": _last(self.nmi), "nmi_mean": _mean(self.nmi)}
            values["head_similarity_mean"] = _mean(self.head_similarity)
        return values


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else np.nan


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def accumulate(
    probe: Probe, *, norm: Literal["frobenius", "composite"] = "frobenius", level: OpenUnitInterval = 0.95
) -> _Sums:
    """Return what `oversmoothing` keeps between batches; arguments and errors are its own."""
    check_level(level)
    if norm not in NORMS:
        raise ValueError(f"Expected norm to be one of {', '.join(NORMS)}, received {norm!r}.")
    probe.check_taps()
    return _Sums(probe, norm, level)


@declares_cost(feature_pass_cost(accumulate))
@shares_pass(accumulate)
@record_options
def oversmoothing(
    probe: Probe, *, norm: Literal["frobenius", "composite"] = "frobenius", level: OpenUnitInterval = 0.95
) -> OversmoothingResult:
    """Measure how similar the tokens of an image become with depth, in one forward pass per batch.

    Tokens X, one per row, are patch tokens or the positions of a map, without class and register tokens. The rank-1 residual is
    ``|X - 1 m'| / |X|`` with the mean token m. Dong et al. (2021) use the composite norm ``sqrt(|X|_1 |X|_inf)``, of which the
    mean is not the minimizer; it is that of the Frobenius norm, the default. Attention (Park et al. 2023): the normalized mutual
    information ``I(q, k) / sqrt(H(q) H(k))`` of query and key positions, where all queries are equally likely, in each window;
    the mean cosine of the attention of pairs of heads; and the cosine of that of pairs of layers.

    Args:
        probe: Model and images.
        norm: Norm of the rank-1 residual.
        level: Coverage of the t-intervals over images.

    Raises:
        ValueError: No tap, an unknown norm, or a level outside (0, 1).
    """
    sums = accumulate(probe, norm=norm, level=level)
    run_feature_pass(probe, [sums], "oversmoothing")
    return sums.result()


class _Sums:
    """Sums that are kept between batches: means over images of each tap and of each unit's attention."""

    def __init__(self, probe: Probe, norm: str, level: float) -> None:
        self.probe, self.norm, self.level = probe, norm, level
        self.cosines, self.residuals = ([RunningMean() for _ in probe.taps] for _ in range(2))
        self.sizes: dict[int, tuple[int, int]] = {}
        self.attention_units, self.unread = readable_units(probe)
        self.attention = [AttentionCollapse(unit) for unit in self.attention_units]
        self.layers = RunningMean()
        self.reads_maps = True
        self._groups = comparable_groups(self.attention_units)
        self._batch: dict[int, Tensor] = {}

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        self.sizes[index] = (x.shape[2], x.shape[3])
        self.cosines[index].add(mean_cosine(x))
        residual = rank1_residual(x, self.norm)
        # a single token is its own mean
        self.residuals[index].add(residual if x.shape[2] * x.shape[3] > 1 else torch.full_like(residual, torch.nan))

    def read_attention(self, index: int, unit: Any, weights: Tensor) -> None:
        """Take the attention weights ``(B * n_windows, heads, queries, keys)`` of one unit."""
        self._batch[index] = self.attention[index].add(weights)

    def close_batch(self, number: int, n_images: int) -> None:
        """Compare the layers' attention."""
        if self._batch:
            self.layers.add(layer_cosines(self._batch, self._groups, len(self.attention_units)))
        self._batch.clear()

    def result(self) -> OversmoothingResult:
        """Return the means and their intervals."""
        return _result(self)


def _result(sums: _Sums) -> OversmoothingResult:
    probe, units = sums.probe, sums.attention_units
    cosine, residual, (layers,), of_heads, nmi, pairs = estimate_lists(
        [
            sums.cosines,
            sums.residuals,
            [sums.layers],
            [unit.head_nmi for unit in sums.attention],
            [unit.nmi for unit in sums.attention],
            [unit.head_similarity for unit in sums.attention],
        ],
        sums.level,
    )
    sizes: dict[int, tuple[int, int]] = {}
    for share in distributed.gather_objects(sums.sizes):
        sizes |= share
    n_images = max(mean.count for mean in cosine)
    reasons = sums.unread | _tap_reasons(probe.taps, sizes, cosine, residual) | _unit_reasons(units, nmi, layers)
    warn_nulls("oversmoothing", reasons)
    warn_nulls("oversmoothing", few_images(n_images))
    return OversmoothingResult(
        **tap_fields(probe.taps),
        map_sizes=np.array([sizes.get(index, (0, 0)) for index in range(len(probe.taps))]),
        cosine=numbers(cosine, "mean"),
        cosine_half_width=numbers(cosine, "half_width"),
        rank1_residual=numbers(residual, "mean"),
        rank1_residual_half_width=numbers(residual, "half_width"),
        norm=sums.norm,
        attention_units=tuple(unit.name for unit in units),
        attention_depths=np.array([unit.unit.depth for unit in units], dtype=float),
        nmi=numbers(nmi, "mean"),
        nmi_half_width=numbers(nmi, "half_width"),
        head_nmi=_heads([_finite(mean.mean) for mean in of_heads]),
        head_similarity=numbers(pairs, "mean"),
        head_similarity_half_width=numbers(pairs, "half_width"),
        layer_similarity=_square(layers.mean, len(units)),
        layer_similarity_half_width=_square(layers.half_width, len(units)),
        level=sums.level,
        n_images=n_images,
        card=probe.card(),
    )


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.atleast_1d(values)
    return np.where(np.isfinite(values), values, np.nan)


def _heads(rows: Sequence[np.ndarray]) -> np.ndarray | tuple[np.ndarray, ...]:
    """Return one array of the units' heads, or a tuple where their numbers differ."""
    if not rows:
        return np.zeros((0, 0))
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else tuple(rows)


def _square(values: np.ndarray, n: int) -> np.ndarray:
    return _finite(values).reshape(n, n) if np.ndim(values) else np.full((n, n), np.nan)


def _tap_reasons(
    taps: Sequence[Tap],
    sizes: Mapping[int, tuple[int, int]],
    cosine: Sequence[Estimate],
    residual: Sequence[Estimate],
) -> dict[str, str]:
    """Return why taps have no numbers, by their names."""
    reasons = {}
    for index, tap in enumerate(taps):
        if index not in sizes:
            reasons[tap.name] = "not reached by the forward pass"
        elif sizes[index] == (1, 1):
            reasons[tap.name] = "1x1 map"
        elif not np.isfinite(residual[index].mean):
            reasons[tap.name] = "an image whose activations are zero or not finite"
        elif not np.isfinite(cosine[index].mean):
            reasons[f"the cosine at {tap.name}"] = "an image with fewer than two tokens that are not zero"
    return reasons


def _unit_reasons(units: Sequence[AttentionUnit], nmi: Sequence[Estimate], layers: Estimate) -> dict[str, str]:
    """Return why numbers of attention are missing."""
    reasons = {}
    for unit, mean in zip(units, nmi):
        if not bool((unit.queries[..., 0] >= 0).any() and (unit.keys[..., 0] >= 0).any()):
            reasons[f"attention of {unit.name}"] = "no query or no key with a position"
            continue
        if not np.isfinite(mean.mean):
            reasons[f"mutual information of {unit.name}"] = "weights that are not finite, or a single query"
        if unit.n_heads == 1:
            reasons[f"similarity of heads of {unit.name}"] = "one head"
    if not reasons and not np.isfinite(layers.mean).all() and units:
        reasons["similarity of some layers"] = "their tokens or windows have different positions"
    return reasons
