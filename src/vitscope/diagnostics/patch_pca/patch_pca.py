"""First three principal components of patch features as colors, as in the figures of DINOv2 (Oquab et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.input_normalization import shown_images
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.results.result_file import load as load_result
from vitscope.core.tap import Tap, chosen_taps, tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.patch_pca._components import (
    N_COMPONENTS,
    Components,
    colors_of,
    gathered_moments,
    principal_components,
    rotation_to,
)
from vitscope.diagnostics.patch_pca._sums import PatchSums
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveInt
from vitscope.stats.intervals import LEAST_IMAGES, check_level, few_images
from vitscope.stats.jackknife import jackknife_half_width


@dataclass(frozen=True)
class PatchPcaResult(
    Result,
    coordinates=TAP_COORDINATES,
    untabulated=("tap_colors", "scores", "foreground_masks", "components", "feature_means", "images"),
):
    """Principal components over all patches of all images, and colors of the first images; NaN is null.

    ``colors``, ``explained_variance``, its half width and its ratio are those of the last of the chosen taps.

    Attributes:
        taps: (n_taps) names of the chosen taps in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        tap_colors: (n_taps, n_shown, h, w, 3) one array per tap, in [0, 1]; background 0.
        scores: (n_taps, n_shown, h, w, 3) one array per tap: coordinates along the components, rotated to the reference if any.
        foreground_masks: (n_taps, n_shown, h, w) one array per tap: whether a patch is foreground; all without a threshold.
        foreground_share: (n_taps,) share of foreground patches among those of all images.
        variances: (n_taps, n_components) variance along each component, divisor n - 1.
        variance_half_widths: (n_taps, n_components) half the t-interval over images; NaN with fewer than 128.
        ratios: (n_taps, n_components) share of the variance of all channels.
        ratio_half_widths: (n_taps, n_components) likewise.
        components: (n_taps, n_components, C) one array per tap: axes of length 1, the largest entry of each positive.
        feature_means: (n_taps, C) one array per tap: mean feature vector.
        n_vectors: (n_taps,) patches from which the components were computed.
        alignment: (n_taps, n_components, 3) orthogonal matrix that was applied to the scores; the identity without a reference.
        alignment_r2: (n_taps,) squared Procrustes correlation with the reference; NaN without one.
        images: (n_shown, H, W, 3) uint8, the first images.
        foreground: Threshold on the first component in standard deviations; NaN without one.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    tap_colors: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    foreground_masks: tuple[np.ndarray, ...]
    foreground_share: np.ndarray
    variances: np.ndarray
    variance_half_widths: np.ndarray
    ratios: np.ndarray
    ratio_half_widths: np.ndarray
    components: tuple[np.ndarray, ...]
    feature_means: tuple[np.ndarray, ...]
    n_vectors: np.ndarray
    alignment: np.ndarray
    alignment_r2: np.ndarray
    images: np.ndarray
    foreground: float
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    @property
    def colors(self) -> np.ndarray:
        """Colors ``(n_shown, h, w, 3)`` in [0, 1] at the last chosen tap."""
        return self.tap_colors[-1]

    @property
    def explained_variance(self) -> np.ndarray:
        """Variance ``(3,)`` along each component at the last chosen tap."""
        return self.variances[-1]

    @property
    def explained_variance_half_width(self) -> np.ndarray:
        """Half the t-interval ``(3,)`` of each."""
        return self.variance_half_widths[-1]

    @property
    def explained_variance_ratio(self) -> np.ndarray:
        """Share ``(3,)`` of the variance of all channels along each component at the last chosen tap."""
        return self.ratios[-1]

    def scalars(self) -> dict[str, float]:
        """Return the shares of variance at the last chosen tap, and that of the foreground where one was split off."""
        values = {f"explained_variance_ratio_{i + 1}": float(ratio) for i, ratio in enumerate(self.ratios[-1])}
        if np.isfinite(self.foreground):
            values["foreground_share"] = float(self.foreground_share[-1])
        return values


def accumulate(
    probe: Probe, *, images: PositiveInt = 8, taps: str | Sequence[str] = "last", level: OpenUnitInterval = 0.95
) -> _Accumulator:
    """Return what `patch_pca` keeps between batches; arguments and errors are its own."""
    check_level(level)
    if images < 1:
        raise ValueError(f"Expected images of at least 1, received {images}.")
    probe.check_taps()
    return _Accumulator(probe, chosen_taps(probe.taps, taps), images, level)


@declares_cost(feature_pass_cost(accumulate))
@shares_pass(accumulate)
@record_options
def patch_pca(
    probe: Probe,
    *,
    images: PositiveInt = 8,
    taps: str | Sequence[str] = "last",
    foreground: float | None = None,
    reference: PatchPcaResult | str | Path | None = None,
    level: OpenUnitInterval = 0.95,
) -> PatchPcaResult:
    """Measure the principal components of patch features over all images and color the patches of the first ones.

    The feature vectors at all positions of all images, prefix tokens left out, have one mean and one covariance, from which come
    the components; each component's 1 % and 99 % quantiles over the shown images become 0 and 1 of red, green and blue.
    One forward pass, shared with other measures of feature maps; a second one with ``foreground``.

    Args:
        probe: Model, images and taps.
        images: First images that are colored.
        taps: ``last``, ``stages`` (the last tap of each), ``all``, or names.
        foreground: Threshold on the score of the first component in its standard deviations, such as 0: components are then
            those of the patches above it alone, and the others are black. The sign is that for which the border of the images
            scores lower than the average patch.
        reference: A result of another model for the same images, or the path of a saved one: scores are rotated by the
            orthogonal matrix that brings them nearest to those of the reference's last tap (Procrustes).
        level: Coverage of the t-intervals over images.

    Raises:
        ValueError: No tap or an unknown one, maps whose shape changes, maps without a position inside of their border and a
            foreground, or a reference with other images.
    """
    aligned_to = _reference(reference)
    accumulator = accumulate(probe, images=images, taps=taps, level=level)
    run_feature_pass(probe, [accumulator], "patch PCA")
    result = accumulator.result(foreground)
    return result if aligned_to is None else _aligned(result, aligned_to)


class _Accumulator:
    """Sums of one forward pass for the chosen taps."""

    def __init__(self, probe: Probe, taps: Sequence[Tap], n_shown: int, level: float) -> None:
        self.probe, self.taps, self.n_shown, self.level = probe, taps, n_shown, level
        self.sums = PatchSums([tap.name for tap in taps], n_shown)

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take the maps of a tap."""
        self.sums.read(index, tap, x)

    def close_batch(self, number: int, n_images: int) -> None:
        """Add the batch."""
        self.sums.close_batch(number, n_images)

    def result(self, foreground: float | None = None) -> PatchPcaResult:
        """Return the components and colors; with a threshold after a second pass over the patches above it."""
        features = self.sums.shown_features()
        if len(features) < len(self.taps):
            raise ValueError(f"Expected the taps {', '.join(self.sums.names)} to be reached, received a pass without.")
        parts = [_components(groups, maps) for groups, maps in zip(self.sums.result(), features)]
        masks = [np.ones((len(maps), *maps.shape[2:]), dtype=bool) for maps in features]
        n_all = np.array([part.n_vectors for part in parts])
        if foreground is not None:
            _check_border(self.taps, features)
            rules = [_ForegroundRule(part, sums.border_side, foreground) for part, sums in zip(parts, self.sums.border)]
            second = PatchSums(self.sums.names, 0, lambda place, x: rules[place].mask(x))
            run_feature_pass(self.probe, [second], "patch PCA of the foreground")
            masks = [rule.mask(torch.from_numpy(maps)).numpy() for rule, maps in zip(rules, features)]
            parts = [_components(groups, maps) for groups, maps in zip(second.result(), features)]
        return self._result(parts, features, masks, n_all, foreground)

    def _result(
        self,
        parts: Sequence[Components],
        features: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        n_all: np.ndarray,
        foreground: float | None,
    ) -> PatchPcaResult:
        n_images = sum(gather_objects(self.sums.n_images))
        warn_nulls("patch_pca", {tap.name: part.reason for tap, part in zip(self.taps, parts) if part.reason})
        warn_nulls("patch_pca", few_images(n_images))
        scores = tuple(part.scores(maps) for part, maps in zip(parts, features))
        n_vectors = np.array([part.n_vectors for part in parts])
        return PatchPcaResult(
            **tap_fields(self.taps),
            tap_colors=tuple(colors_of(*pair) for pair in zip(scores, masks)),
            scores=scores,
            foreground_masks=tuple(masks),
            foreground_share=n_vectors / n_all,
            variances=np.array([part.variance for part in parts]),
            variance_half_widths=self._half_widths([part.variance_without for part in parts], n_images),
            ratios=np.array([part.ratio for part in parts]),
            ratio_half_widths=self._half_widths([part.ratio_without for part in parts], n_images),
            components=tuple(part.axes for part in parts),
            feature_means=tuple(part.mean for part in parts),
            n_vectors=n_vectors,
            alignment=np.broadcast_to(np.eye(N_COMPONENTS), (len(parts), N_COMPONENTS, N_COMPONENTS)).copy(),
            alignment_r2=np.full(len(parts), np.nan),
            images=shown_images(self.probe, self.n_shown),
            foreground=np.nan if foreground is None else float(foreground),
            level=self.level,
            n_images=n_images,
            card=self.probe.card(),
        )

    def _half_widths(self, without: Sequence[np.ndarray], n_images: int) -> np.ndarray:
        half_widths = np.array([jackknife_half_width(values, self.level) for values in without])
        return half_widths if n_images >= LEAST_IMAGES else np.full_like(half_widths, np.nan)


def _components(groups: Any, maps: np.ndarray) -> Components:
    return principal_components(gathered_moments(groups), maps.shape[1])


def _check_border(taps: Sequence[Tap], features: Sequence[np.ndarray]) -> None:
    """Refuse maps ``(n_shown, C, h, w)`` whose positions are all at the border, which then says nothing on the background."""
    for tap, maps in zip(taps, features):
        if min(maps.shape[2:]) < 3:
            raise ValueError(
                f"Expected maps of at least 3x3 positions for a foreground, received {maps.shape[2]}x{maps.shape[3]} at "
                f"{tap.name}: all lie at the border. Pass foreground=None, or taps= with the names of larger maps."
            )


class _ForegroundRule:
    """The side of a threshold on the first component that is foreground."""

    def __init__(self, part: Components, border_side: Any, threshold: float) -> None:
        axis = part.axes[0]
        axis = -axis if border_side(axis) > 0 else axis
        self._axis, self._mean = torch.from_numpy(axis), torch.from_numpy(part.mean)
        self._threshold = threshold * float(np.sqrt(part.variance[0]))

    def mask(self, x: Tensor) -> Tensor:
        """Return which patches ``(B, h, w)`` of maps ``(B, C, h, w)`` are foreground; none where a score is not finite."""
        axis, mean = self._axis.to(x.device), self._mean.to(x.device)
        scores = torch.einsum("bchw,c->bhw", x.double() - mean[:, None, None], axis)
        return scores > self._threshold


def _reference(reference: PatchPcaResult | str | Path | None) -> PatchPcaResult | None:
    if reference is None or isinstance(reference, PatchPcaResult):
        return reference
    result = load_result(Path(reference))
    if not isinstance(result, PatchPcaResult):
        raise ValueError(f"Expected reference to be a saved result of patch_pca, received {str(reference)!r}.")
    return result


def _aligned(result: PatchPcaResult, reference: PatchPcaResult) -> PatchPcaResult:
    """Return the result with its scores rotated to those of the reference's last tap.

    Raises:
        ValueError: The reference shows other images.
    """
    n, n_reference = len(result.scores[-1]), len(reference.scores[-1])
    if n != n_reference or not _show_same(result.images, reference.images):
        difference = ", which differ" if n == n_reference else ""
        raise ValueError(
            f"Expected a reference of the same images, received {n_reference} images beside {n}{difference}: measure both "
            "models on one probe's batches."
        )
    goal, goal_mask = reference.scores[-1], reference.foreground_masks[-1]
    pairs = [rotation_to(s, mask, goal, goal_mask) for s, mask in zip(result.scores, result.foreground_masks)]
    scores = tuple(s @ rotation for s, (rotation, _) in zip(result.scores, pairs))
    return replace(
        result,
        scores=scores,
        tap_colors=tuple(colors_of(*pair) for pair in zip(scores, result.foreground_masks)),
        alignment=np.array([rotation for rotation, _ in pairs]),
        alignment_r2=np.array([r2 for _, r2 in pairs]),
    )


def _show_same(images: np.ndarray, others: np.ndarray) -> bool:
    """Tell whether images are the same up to the rounding of two normalizations; sizes may differ."""
    if images.shape != others.shape:
        return len(images) == len(others)
    return not images.size or float(np.abs(images.astype(float) - others).mean()) < 2
