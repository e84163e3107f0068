"""Similarity of the representations of two layers by Procrustes, mutual neighbors, RSA, linear regression and CKA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.tap import Tap
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.cka._batch_hsic import BatchHsic
from vitscope.diagnostics.cka._comparison_cost import comparison_cost
from vitscope.diagnostics.cka._comparisons import COMPARISONS, Pair
from vitscope.diagnostics.cka._hsic import MIN_IMAGES, gram
from vitscope.diagnostics.cka._measure_choice import (
    DEFAULT_FEATURES,
    FeatureName,
    MeasureName,
    check_choice,
    check_number_of_images,
    measure_names,
)
from vitscope.diagnostics.cka._null_reasons import missing_intervals, undefined_taps
from vitscope.diagnostics.cka._representations import (
    FeatureStore,
    Representation,
    all_taps,
    check_reached,
    flattened,
    null_reason,
    pooled,
)
from vitscope.diagnostics.cka._resampling import resampled
from vitscope.diagnostics.cka._two_models import IMAGES_OF_OTHER, shows_one_model, tap_fields_of_both, through_both
from vitscope.runtime import distributed
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveInt, Seed
from vitscope.stats.intervals import LEAST_IMAGES
from vitscope.stats.jackknife import jackknife_half_width

_OTHER = {f"other_{column}": f"other_{name}" for column, name in TAP_COORDINATES.items()}

#: similarities of the nulls that are this close to the measured one count as equal to it
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SimilarityResult(Result, coordinates={"measure": "measures"} | TAP_COORDINATES | _OTHER):
    """Similarities of every pair of layers, each beside what layers with nothing in common reach.

    Attributes:
        measures: (n_measures,) names, in the order asked for.
        features: (n_measures,) ``pooled`` or ``flattened``, what each measure compares.
        taps: (n_taps,) names, by depth.
        kinds: (n_taps,) such as ``msa``.
        stages: (n_taps,) from 0, the stem.
        depths: (n_taps,) from 0 to 1.
        other_taps: (n_other_taps,) of the second model; those of the first where there is none. Likewise the next three.
        other_kinds: (n_other_taps,) see above.
        other_stages: (n_other_taps,) see above.
        other_depths: (n_other_taps,) see above.
        similarities: (n_measures, n_taps, n_other_taps) NaN where a representation does not vary or is not finite.
        half_widths: (n_measures, n_taps, n_other_taps) half the 95 % interval, a jackknife over 10 groups of images (over
            batches for ``cka``); NaN with fewer than 128 images, or one batch.
        null_means: (n_measures, n_taps, n_other_taps) mean similarity with the second's images permuted.
        p_values: (n_measures, n_taps, n_other_taps) share of similarities of permuted images, the measured one counted, that
            are at least the measured one.
        n_images: Images used.
        card: Conditions of the measurement.
    """

    measures: tuple[str, ...]
    features: tuple[str, ...]
    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    other_taps: tuple[str, ...]
    other_kinds: tuple[str, ...]
    other_stages: np.ndarray
    other_depths: np.ndarray
    similarities: np.ndarray
    half_widths: np.ndarray
    null_means: np.ndarray
    p_values: np.ndarray
    n_images: int
    card: ObjectiveCard | None = None

    @property
    def similarity(self) -> np.ndarray:
        """Similarity ``(n_taps, n_other_taps)`` of the only measure; ``(n_measures, n_taps, n_other_taps)`` of several."""
        return self.similarities[0] if len(self.measures) == 1 else self.similarities

    def of(self, measure: str) -> np.ndarray:
        """Return the similarity ``(n_taps, n_other_taps)`` by one of the measures.

        Raises:
            ValueError: It was not measured.
        """
        if measure not in self.measures:
            raise ValueError(f"Expected one of {', '.join(self.measures)}, received {measure!r}.")
        return self.similarities[self.measures.index(measure)]

    @property
    def is_within_model(self) -> bool:
        """Whether layers of one model are compared with each other."""
        return shows_one_model(self.taps, self.other_taps, self.card)

    def scalars(self) -> dict[str, float]:
        """Return each measure's mean over pairs (of different layers, within one model), and that of its null."""
        pairs = np.ones(self.similarities.shape[1:], dtype=bool)
        if self.is_within_model:
            np.fill_diagonal(pairs, False)
        values = {}
        for index, name in enumerate(self.measures):
            for label, matrix in ((name, self.similarities[index]), (f"{name}_null", self.null_means[index])):
                finite = matrix[pairs & np.isfinite(matrix)]
                values[label] = float(finite.mean()) if len(finite) else np.nan
        return {name: value for name, value in values.items() if np.isfinite(value)}


def accumulate(
    probe: Probe,
    *,
    measure: MeasureName | Sequence[MeasureName] = "procrustes",
    features: FeatureName | None = None,
    n_neighbors: PositiveInt = 10,
    n_permutations: NonNegativeInt = 20,
    max_memory: float | None = None,
    seed: Seed = 0,
) -> _Sums:
    """Return what `similarity` within one model keeps between batches; arguments and errors are its own."""
    probe.check_taps()
    measures = measure_names(measure)
    check_number_of_images(probe, measures, n_neighbors)
    return _Sums(probe, None, measures, features, n_neighbors, n_permutations, max_memory, seed)


@declares_cost(feature_pass_cost(accumulate, evaluation=comparison_cost))
@shares_pass(accumulate)
@record_options
@checks_options(check_choice)
def similarity(
    probe: Probe,
    other: Probe | None = None,
    measure: MeasureName | Sequence[MeasureName] = "procrustes",
    *,
    features: FeatureName | None = None,
    n_neighbors: PositiveInt = 10,
    n_permutations: NonNegativeInt = 20,
    max_memory: float | None = None,
    seed: Seed = 0,
) -> SimilarityResult:
    """Compare the representations of every pair of layers, within a model or between two, on the same images.

    Rows of X and Y are images; docs/definitions.md section 7 gives the formulas.

    - ``procrustes``: nuclear norm of X'Y, X and Y centered and of unit Frobenius norm; 1 - d^2 / 2 of the Procrustes distance
      d. In [0, 1]; it does not change under rotation, scale and shift. Source: Ding et al. (2021), Williams et al. (2021).
    - ``mutual_knn``: mean share of an image's nearest neighbors by cosine similarity that X and Y have in common; of equally
      near images (duplicates) the mean over random draws, also with itself. Source: Huh et al. (2024).
    - ``rsa``: Spearman's correlation of the dissimilarities of all pairs of images, 1 minus the correlation of their features.
      Source: Kriegeskorte et al. (2008).
    - ``linear_regression``: R^2 of Y predicted linearly from X, each image from the ridge regression on all others, so that many
      features of few images do not give 1 (Kornblith et al. 2019 fit and predict the same images). Not symmetric: rows predict.
    - ``cka``: the estimate of `vs.cka`. Source: Nguyen et al. (2021).

    Layers with nothing in common have values near 0, but for ``procrustes``, which rises with features per image, and
    ``mutual_knn`` (k / (n - 1)): read values beside ``null_means``, and compare those of one number of images only. RTD
    (Barannikov et al. 2022) is not offered: no package on PyPI that is kept up computes it.

    Args:
        probe: Model, images and taps; at least four images.
        other: A second model of any width and grid, with the same images in the same batches (see `vs.cka`).
        measure: One of these names, or several, for which one forward pass is made.
        features: ``pooled``: the mean over the positions of a map for each channel, which does not depend on the grid.
            ``flattened``: all positions and channels, of which there are mostly more than images. None: flattened for ``cka``,
            as in its source, else pooled.
        n_neighbors: Number of neighbors of ``mutual_knn``; 10 in Huh et al.
        n_permutations: Orders of the second's images drawn for the null; 20 is the smallest number for p-values below 0.05.
        max_memory: Bytes that the features of all images may take; None: a quarter of what is free.
        seed: Seed of the permutations.

    Raises:
        ValueError: An unknown measure, a probe without taps, fewer than four images, not more images than neighbors and one,
            features that do not fit into memory, images or targets that differ between the probes, or a tap that was not reached.
    """
    for each in (probe, other or probe):
        each.check_taps()
    measures = measure_names(measure)
    check_number_of_images(probe, measures, n_neighbors)
    sums = _Sums(probe, other, measures, features, n_neighbors, n_permutations, max_memory, seed)
    if other is None:
        run_feature_pass(probe, [sums], "similarity")
    else:
        through_both(probe, other, sums, "similarity")
    return sums.result()


class _Sums:
    """Values that are kept between batches: the features of all images, and the HSIC of every pair of taps for CKA."""

    def __init__(
        self, probe: Probe, other: Probe | None, measures: tuple[str, ...], features: FeatureName | None,
        n_neighbors: int, n_permutations: int, max_memory: float | None, seed: int,
    ) -> None:  # fmt: skip
        self.probe, self.other, self.measures = probe, other, measures
        self.n_neighbors, self.n_permutations, self.seed = n_neighbors, n_permutations, seed
        self.features = {name: features or DEFAULT_FEATURES[name] for name in measures}
        self.relations: set[str] = set()  # how the second model's images are related to the first's
        self.n_images = 0
        self._taps = all_taps(probe, other)
        self._rows: dict[int, Tensor] = {}
        self._grams: dict[int, Tensor] = {}
        self._hsic = BatchHsic(len(probe.taps), other is not None, n_permutations, seed) if "cka" in measures else None
        self._kind = next((self.features[name] for name in measures if name != "cka"), None)
        names = [tap.name for tap in self._taps]
        self._store = FeatureStore(names, probe.n_images, max_memory) if self._kind is not None else None

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        if self._kind is not None:
            self._rows[index] = pooled(x) if self._kind == "pooled" else flattened(x)
        if self._hsic is not None and len(x) >= MIN_IMAGES:
            # pooled features are float64, but as exact as the map they are of
            self._grams[index] = gram(pooled(x).to(x.dtype) if self.features["cka"] == "pooled" else x)

    def close_batch(self, number: int, n_images: int) -> None:
        """Keep the batch's features, and compare its maps for CKA."""
        if self._store is not None:
            self._store.add(number, check_reached(self._rows, self._taps))
        if self._hsic is not None and n_images >= MIN_IMAGES:
            self._hsic.add(number, check_reached(self._grams, self._taps))
        if self._store is not None or n_images >= MIN_IMAGES:
            self.n_images += n_images
        self._rows, self._grams = {}, {}

    def result(self) -> SimilarityResult:
        """Return the similarities of the images of all ranks."""
        n_images = sum(distributed.gather_objects(self.n_images))
        representations = self._store.representations() if self._store is not None else []
        null_reasons = [null_reason(x) for x in representations]  # by number: both models may have a tap of one name
        comparable = [None if reason else x for reason, x in zip(null_reasons, representations)]
        blocks = [
            self._cka(n_images) if name == "cka" else self._compared(name, comparable, n_images)
            for name in self.measures
        ]
        similarities, half_widths, null_means, p_values = (np.stack(parts) for parts in zip(*blocks))
        reasons = {tap.name: reason for tap, reason in zip(self._taps, null_reasons) if reason}
        sides = self.probe.taps, (self.other or self.probe).taps
        reasons |= undefined_taps(self.measures, similarities, sides, reasons)
        warn_nulls("similarity", reasons | missing_intervals(self.measures, similarities, half_widths, n_images))
        return SimilarityResult(
            measures=self.measures,
            features=tuple(self.features[name] for name in self.measures),
            **tap_fields_of_both(self.probe, self.other or self.probe),
            similarities=similarities,
            half_widths=half_widths,
            null_means=null_means,
            p_values=p_values,
            n_images=n_images,
            card=self.probe.card(**self._facts()),
        )

    def _compared(self, name: str, representations: Sequence[Representation | None], n_images: int) -> _Block:
        """Return the numbers of one measure for the representations that have none of the reasons to be null."""
        n_first = len(self.probe.taps)
        first = [x for x in representations[:n_first] if x is not None]
        second = [x for x in representations[n_first:] if x is not None]
        rows = [i for i, x in enumerate(representations[:n_first]) if x is not None]
        columns = [i for i, x in enumerate(representations[n_first:]) if x is not None] if self.other else rows
        shape = (n_first, len(self._taps) - n_first or n_first)
        if not rows or not columns:
            return _block(np.full(shape, np.nan), np.full(shape, np.nan), np.zeros((0, *shape)))
        whole, left_out, nulls = resampled(
            COMPARISONS[name](self.n_neighbors),
            Pair(first, first if self.other is None else second, self.other is None),
            n_permutations=self.n_permutations,
            seed=self.seed,
            intervals=n_images >= LEAST_IMAGES,
            description=f"similarity: {name}",
        )
        half_width = jackknife_half_width(left_out) if len(left_out) else np.full(whole.shape, np.nan)

        def placed(values: np.ndarray) -> np.ndarray:
            full = np.full((*values.shape[:-2], *shape), np.nan)
            full[..., np.array(rows)[:, None], np.array(columns)] = values
            return full

        return _block(placed(whole), placed(half_width), placed(nulls))

    def _cka(self, n_images: int) -> _Block:
        assert self._hsic is not None
        value, half_width, nulls = self._hsic.result()
        return _block(value, half_width if n_images >= LEAST_IMAGES else np.full_like(half_width, np.nan), nulls)

    def _facts(self) -> dict[str, dict[str, str]]:
        if self.other is None:
            return {}
        relations = set[str]().union(*distributed.gather_objects(self.relations))
        return {"solver": {IMAGES_OF_OTHER: "; ".join(sorted(relations))}}


#: similarity, half width, mean of the null and p-value of one measure, ``(S, T)`` each
_Block = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _block(value: np.ndarray, half_width: np.ndarray, nulls: np.ndarray) -> _Block:
    """Return the numbers of one measure; the null is undefined without permutations."""
    undefined = np.full(value.shape, np.nan)
    if not len(nulls):
        return value, half_width, undefined, undefined
    p = (1 + (nulls >= value - _ROUNDING).sum(axis=0)) / (1 + len(nulls))
    return value, half_width, nulls.mean(axis=0), np.where(np.isfinite(value), p, np.nan)
