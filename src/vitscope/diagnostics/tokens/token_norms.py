"""Norms of tokens by depth: artefact tokens (Darcet et al. 2024), massive activations (Sun et al. 2024), attention sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.tap import Tap, tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.tokens._artefacts import Artefacts, artefacts, first_with_artefacts
from vitscope.diagnostics.tokens._attention_sinks import AttentionSinks, sink_fields
from vitscope.diagnostics.tokens._attention_units import readable_units
from vitscope.diagnostics.tokens._prefix_kinds import prefix_kinds
from vitscope.diagnostics.tokens._token_statistics import (
    TapEstimates,
    TapFacts,
    TapSums,
    gathered_rows,
    tap_estimates,
    tap_facts,
)
from vitscope.diagnostics.tokens._token_tables import QUANTILES, largest_channels, numbers, padded, quantiles, stacked
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveFloat, PositiveInt
from vitscope.stats.intervals import check_level, few_images


@dataclass(frozen=True)
class TokenNormsResult(
    Result,
    coordinates={
        "tap": "taps",
        "kind": "kinds",
        "stage": "stages",
        "depth": ("depths", "attention_depths"),
        "quantile": "quantile_levels",
        "unit": "attention_units",
    },
    untabulated=("norms_patch", "norms_prefix", "channel_norms", "attention_received"),
):
    """Euclidean norms over channels, by tap; NaN is null. Patch tokens are the positions of a map, in rows.

    Attributes:
        taps: (n_taps) names in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        map_sizes: (n_taps, 2) height and width.
        prefix_kinds: (n_prefix) ``class``, ``distillation``, ``register`` or ``unknown``, in the order of the sequence.
        norms_patch: (n_taps, n_norm_images, n_tokens) float32; one array (n_norm_images, n_tokens) a tap where the numbers of
            tokens differ.
        norms_prefix: (n_taps, n_norm_images, n_prefix) likewise.
        norm: (n_taps,) mean over patch tokens and images.
        norm_half_width: (n_taps,) half its t-interval over images; NaN with fewer than 128.
        norm_quantiles: (n_taps, n_quantiles) of the norms of all patch tokens of the kept images.
        quantile_levels: (n_quantiles,) in [0, 1].
        prefix_norm: (n_taps, n_prefix) mean over images of each prefix token; NaN where a tap does not have it.
        prefix_norm_half_width: (n_taps, n_prefix) half their t-intervals over images.
        artefact_threshold: (n_taps,) norm above which a patch token is an artefact.
        artefact_share: (n_taps,) share of patch tokens that are artefacts, mean over the kept images.
        artefact_share_half_width: (n_taps,) half its t-interval; NaN with fewer than 128 images, or 10 with an artefact.
        artefact_frequency: (n_taps, h, w) one array per tap: share of the kept images with an artefact at each position.
        bimodality: (n_taps,) Sarle's coefficient of the logarithms of the norms: 1/3 normal, 5/9 uniform, 1 for two values.
        first_artefact_tap: Index of the tap at which artefacts appear; -1 where no tap has 0.5 % of them.
        massive_ratio: (n_taps,) largest magnitude of an image's tokens over the median magnitude, mean over images.
        massive_ratio_half_width: (n_taps,) half its t-interval over images; NaN with fewer than 128.
        largest_magnitude: (n_taps,) mean over images.
        massive_share: (n_taps,) share of images with an activation above 100 and at least 1000 times the median magnitude.
        massive_on_prefix: (n_taps,) share of images whose largest magnitude is one of a prefix token.
        massive_channels: (n_taps, n_channels) numbers of the channels with the largest magnitudes, descending; -1 for none.
        massive_channel_magnitudes: (n_taps, n_channels) their largest magnitudes, mean over images.
        channel_norms: (n_taps, C) one array per tap: root mean square of each channel over positions, mean over images.
        attention_units: (n_units) names of the units whose attention could be read; none in a ConvNet.
        attention_depths: (n_units,) normalized depth among all units of the model.
        attention_received: (n_units, n_norm_images, n_keys) float32; one array per unit if the numbers of keys differ: attention
            that each position of the map of keys receives, mean over heads and queries, times the number of keys, so that
            equal attention is 1.
        attention_prefix: (n_units, n_prefix) likewise, of each prefix token, mean over images.
        attention_artefacts: (n_units,) likewise, mean over the artefacts of the tap before the unit; NaN where it has none.
        sink_ratio: (n_units,) largest attention that one token of an image receives, likewise; mean over images.
        sink_ratio_half_width: (n_units,) half its t-interval over images; NaN with fewer than 128.
        sink_on_prefix: (n_units,) share of images in which that token is a prefix token.
        n_norm_images: Number of images whose norms are kept.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    map_sizes: np.ndarray
    prefix_kinds: tuple[str, ...]
    norms_patch: np.ndarray | tuple[np.ndarray, ...]
    norms_prefix: np.ndarray | tuple[np.ndarray, ...]
    norm: np.ndarray
    norm_half_width: np.ndarray
    norm_quantiles: np.ndarray
    quantile_levels: np.ndarray
    prefix_norm: np.ndarray
    prefix_norm_half_width: np.ndarray
    artefact_threshold: np.ndarray
    artefact_share: np.ndarray
    artefact_share_half_width: np.ndarray
    artefact_frequency: tuple[np.ndarray, ...]
    bimodality: np.ndarray
    first_artefact_tap: int
    massive_ratio: np.ndarray
    massive_ratio_half_width: np.ndarray
    largest_magnitude: np.ndarray
    massive_share: np.ndarray
    massive_on_prefix: np.ndarray
    massive_channels: np.ndarray
    massive_channel_magnitudes: np.ndarray
    channel_norms: tuple[np.ndarray, ...]
    attention_units: tuple[str, ...]
    attention_depths: np.ndarray
    attention_received: np.ndarray | tuple[np.ndarray, ...]
    attention_prefix: np.ndarray
    attention_artefacts: np.ndarray
    sink_ratio: np.ndarray
    sink_ratio_half_width: np.ndarray
    sink_on_prefix: np.ndarray
    n_norm_images: int
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the last tap's norm, and the largest share of artefacts, massive ratio, bimodality and sink ratio by depth."""
        values = {
            "norm_last": float(self.norm[-1]),
            "artefact_share_max": _largest(self.artefact_share),
            "massive_ratio_max": _largest(self.massive_ratio),
            "bimodality_max": _largest(self.bimodality),
        }
        if len(self.attention_units):
            values["sink_ratio_max"] = _largest(self.sink_ratio)
        if self.first_artefact_tap >= 0:
            values["first_artefact_depth"] = float(self.depths[self.first_artefact_tap])
        return values


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan


def accumulate(
    probe: Probe,
    *,
    threshold: PositiveFloat | None = None,
    norm_images: PositiveInt | None = 512,
    positions: PositiveInt | None = 16,
    level: OpenUnitInterval = 0.95,
) -> _Sums:
    """Return what `token_norms` keeps between batches; arguments and errors are its own."""
    check_level(level)
    for name, value in (("threshold", threshold), ("norm_images", norm_images), ("positions", positions)):
        if value is not None and not value > 0:
            raise ValueError(f"Expected {name} to be greater than 0 or None, received {value}.")
    probe.check_taps()
    return _Sums(probe, threshold, norm_images, positions, level)


@declares_cost(feature_pass_cost(accumulate))
@shares_pass(accumulate)
@record_options
def token_norms(
    probe: Probe,
    *,
    threshold: PositiveFloat | None = None,
    norm_images: PositiveInt | None = 512,
    positions: PositiveInt | None = 16,
    level: OpenUnitInterval = 0.95,
) -> TokenNormsResult:
    """Measure the norms of tokens at every tap in one forward pass per batch: patch, class, distillation and register tokens.

    In a ConvNet the tokens are the positions of a map. A patch token is an artefact where its norm is above ``threshold``, by
    default ``exp(m + max(5 * 1.4826 * mad, ln 2))`` with the median m and the median absolute deviation mad of the logarithms
    of all norms of the tap: at least twice the median (the 150 of Darcet et al. 2024 is right for DINOv2-g alone). Massive
    activations (Sun et al. 2024) are the largest magnitudes of an image's activations, against the median magnitude.

    Args:
        probe: Model and images.
        threshold: Norm above which a token is an artefact, the same at every tap; None for the default rule at each tap.
        norm_images: Images whose norms are kept, the first ones of the probe, four bytes a token and tap; thresholds,
            shares, quantiles and frequencies are theirs. None for all.
        positions: Largest number of positions of a map, drawn once, for the median magnitude; None for all.
        level: Coverage of the t-intervals over images.

    Raises:
        ValueError: No tap, maps of several shapes at a tap, or an option outside of its range.
    """
    sums = accumulate(probe, threshold=threshold, norm_images=norm_images, positions=positions, level=level)
    run_feature_pass(probe, [sums], "token norms")
    return sums.result()


class _Sums:
    """Values that are kept between batches: the norms and means of each tap."""

    def __init__(
        self, probe: Probe, threshold: float | None, norm_images: int | None, positions: int | None, level: float
    ) -> None:
        self.probe, self.threshold, self.level = probe, threshold, level
        self.taps = [TapSums(norm_images, positions) for _ in probe.taps]
        self.attention_units, self.unread = readable_units(probe)
        self.sinks = [AttentionSinks(unit, norm_images) for unit in self.attention_units]
        self.reads_maps = True
        self._prefix: Tensor | None = None

    def read_prefix(self, index: int, tap: Tap, tokens: Tensor) -> None:
        """Keep the prefix tokens ``(B, n_prefix, C)`` until the tap's map is read."""
        self._prefix = tokens

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        prefix, self._prefix = self._prefix, None
        self.taps[index].read(tap, x, prefix)

    def read_attention(self, index: int, unit: Any, weights: Tensor) -> None:
        """Take the attention weights ``(B * n_windows, heads, queries, keys)`` of one unit."""
        self.sinks[index].add(weights)

    def close_batch(self, number: int, n_images: int) -> None:
        """Note the number of the batch."""
        for tap in self.taps:
            tap.close(number)
        for unit in self.sinks:
            unit.patch.close(number)

    def result(self) -> TokenNormsResult:
        """Return norms, artefacts, massive activations and their intervals."""
        return _result(self)


def _result(sums: _Sums) -> TokenNormsResult:
    probe, level = sums.probe, sums.level
    means = tap_estimates(sums.taps, level)
    patch, prefix = _kept_norms(sums.taps)
    facts = tap_facts(sums.taps)
    n_images = max(mean.count for mean in means.norm)
    n_prefix = max(tap.n_prefix for tap in facts)
    artefacts_by_tap = [artefacts(norms, sums.threshold, level) for norms in patch]
    shares = np.array([tap.share for tap in artefacts_by_tap])
    names = tuple(tap.name for tap in probe.taps)
    attention = sink_fields(sums.sinks, names, [tap.above for tap in artefacts_by_tap], n_prefix, level)
    warn_nulls("token_norms", {**sums.unread, **_null_reasons(probe.taps, facts, artefacts_by_tap, means)})
    warn_nulls("token_norms", few_images(n_images))
    channels, magnitudes = largest_channels(means.peak)
    return TokenNormsResult(
        **tap_fields(probe.taps),
        map_sizes=np.array([tap.shape[1:] for tap in facts]),
        prefix_kinds=prefix_kinds(probe.model, n_prefix),
        norms_patch=stacked(patch),
        norms_prefix=stacked(prefix),
        norm=numbers(means.norm, "mean"),
        norm_half_width=numbers(means.norm, "half_width"),
        norm_quantiles=np.array([quantiles(rows) for rows in patch]),
        quantile_levels=QUANTILES.copy(),
        prefix_norm=padded([mean.mean for mean in means.prefix_norm], n_prefix),
        prefix_norm_half_width=padded([mean.half_width for mean in means.prefix_norm], n_prefix),
        artefact_threshold=np.array([tap.threshold for tap in artefacts_by_tap]),
        artefact_share=shares,
        artefact_share_half_width=np.array([tap.share_half_width for tap in artefacts_by_tap]),
        artefact_frequency=tuple(
            tap.frequency.reshape(tap_fact.shape[1:]) for tap, tap_fact in zip(artefacts_by_tap, facts)
        ),
        bimodality=np.array([tap.bimodality for tap in artefacts_by_tap]),
        first_artefact_tap=first_with_artefacts(shares),
        massive_ratio=numbers(means.ratio, "mean"),
        massive_ratio_half_width=numbers(means.ratio, "half_width"),
        largest_magnitude=numbers(means.largest, "mean"),
        massive_share=numbers(means.massive, "mean"),
        massive_on_prefix=numbers(means.on_prefix, "mean"),
        massive_channels=channels,
        massive_channel_magnitudes=magnitudes,
        channel_norms=tuple(np.atleast_1d(mean.mean) for mean in means.channel),
        **attention,
        n_norm_images=max(map(len, patch)),
        level=level,
        n_images=n_images,
        card=probe.card(),
    )


def _kept_norms(taps: Sequence[TapSums]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the norms (n_norm_images, n) of patch tokens and of prefix tokens of each tap; n is 0 where it has none."""
    all_norms = gathered_rows([rows for tap in taps for rows in (tap.patch, tap.prefix)])
    patch, prefix = all_norms[0::2], all_norms[1::2]
    n_kept = max((len(norms) for norms in patch if norms is not None), default=0)
    none_kept = np.zeros((n_kept, 0), np.float32)
    return (
        [none_kept if norms is None else norms for norms in patch],
        [none_kept if norms is None else norms for norms in prefix],
    )


def _null_reasons(
    taps: Sequence[Tap], facts: Sequence[TapFacts], artefacts_by_tap: Sequence[Artefacts], means: TapEstimates
) -> dict[str, str]:
    """Return why numbers of taps are null, by the tap or the number."""
    reasons = {}
    for tap, tap_fact, tap_artefacts, ratio in zip(taps, facts, artefacts_by_tap, means.ratio):
        has_norms = np.isfinite(tap_artefacts.threshold)
        if tap_fact.shape == (0, 0, 0):
            reasons[tap.name] = "not reached by the forward pass"
        elif not has_norms:
            reasons[tap.name] = "no norm is positive and finite"
        elif np.isnan(tap_artefacts.share):
            reasons[tap.name] = "activations are not finite"
        elif tap_fact.zero_medians:
            reasons[f"the massive ratio at {tap.name}"] = "an image with half of its activations or more at zero"
        elif not np.isfinite(ratio.mean):
            reasons[f"the massive ratio at {tap.name}"] = "activations are not finite"
        if has_norms and np.isnan(tap_artefacts.bimodality):
            reasons[f"the bimodality at {tap.name}"] = "fewer than four norms, or norms that do not differ"
    return reasons
