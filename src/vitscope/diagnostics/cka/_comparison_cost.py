"""Cost of comparing the features of all images, which takes longer than their pass and grows with a power of their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.feature_pass import run_feature_pass
from vitscope.core.probe import Probe
from vitscope.core.tap import Tap
from vitscope.diagnostics.cka._comparisons import COMPARISONS, Pair
from vitscope.diagnostics.cka._measure_choice import DEFAULT_FEATURES
from vitscope.diagnostics.cka._representations import FeatureStore, Representation, flattened, pooled
from vitscope.diagnostics.cka._resampling import resampled
from vitscope.stats.intervals import LEAST_IMAGES

#: taps whose comparison is timed; that of all takes as long as the measure itself
TIMED_TAPS = 6

_OPTIONS = ("measure", "features", "n_neighbors", "n_permutations")


def comparison_cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return the comparisons of all images at all taps; None where CKA alone is measured, which compares batches.

    Procrustes takes decompositions for each pair of taps, the others for each tap. They are timed on random features, as many and
    as wide as those of some taps.
    """
    names = compared_measures(options)
    if not names:
        return None
    n_images = workload.n_images
    n_taps = len(workload.map_sizes or workload.model_probe().taps)
    n_timed = min(n_taps, TIMED_TAPS)
    pairs = n_taps * (n_taps + 1) / (n_timed * (n_timed + 1))
    features = WorkUnit("features of all images", partial(_making, n_images), _OPTIONS, forwards=0, n_timed=1)
    works = [Work(features, Count.exactly(n_taps / n_timed), 1)]
    by_pair, by_tap = (tuple(n for n in names if (n == "procrustes") is is_first) for is_first in (True, False))
    for text, part, repeats in (("pairs of taps", by_pair, pairs), ("taps", by_tap, n_taps / n_timed)):
        if part:
            comparing = partial(_comparing, n_images, part)
            unit = WorkUnit(f"comparison of {text}", comparing, _OPTIONS, forwards=0, n_timed=1)
            works.append(Work(unit, Count.exactly(repeats), 1))
    # a matrix of each tap and its copy with permuted images; the timed ones are counted with their work
    n_matrices = 2.0 * (n_taps - n_timed) if by_tap else 0.0
    return MeasureCost(works, held_bytes=ENTRY * n_matrices * n_images**2)


def compared_measures(options: Options) -> tuple[str, ...]:
    """Return the measures that compare the features of all images."""
    names = [options["measure"]] if isinstance(options["measure"], str) else options["measure"]
    return tuple(name for name in names if name != "cka")


@contextmanager
def _making(n_images: int, probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    features = _random_features(n_images, probe, options)
    yield lambda: _representations(features)


@contextmanager
def _comparing(
    n_images: int, measures: tuple[str, ...], probe: Probe, options: Options
) -> Iterator[Callable[[], object]]:
    representations = _representations(_random_features(n_images, probe, options))
    pair = Pair(representations, representations, within=True)

    def compare() -> None:
        for name in measures:
            resampled(
                COMPARISONS[name](int(options["n_neighbors"])),
                pair,
                n_permutations=int(options["n_permutations"]),
                seed=0,
                intervals=n_images >= LEAST_IMAGES,
                description=name,
            )

    yield compare


def _representations(features: list[Tensor]) -> list[Representation]:
    store = FeatureStore([""] * len(features), len(features[0]), float("inf"))
    store.add(0, features)
    return store.representations()


def _random_features(n_images: int, probe: Probe, options: Options) -> list[Tensor]:
    """Return random features ``(n_images, D)`` as wide as those of some taps, from the first to the last."""
    first_measure = compared_measures(options)[0]
    read = _OneImage((options["features"] or DEFAULT_FEATURES[first_measure]) == "pooled")
    run_feature_pass(probe, [read], "feature maps")
    generator = torch.Generator().manual_seed(0)
    places = np.linspace(0, len(probe.taps) - 1, min(len(probe.taps), TIMED_TAPS)).round().astype(int)
    rows = [read.rows[place] for place in places.tolist()]
    return [torch.randn(n_images, x.shape[1], generator=generator, dtype=x.dtype) for x in rows]


class _OneImage:
    """An accumulator that keeps the features of the last images at each tap."""

    def __init__(self, is_pooled: bool) -> None:
        self.is_pooled = is_pooled
        self.rows: dict[int, Tensor] = {}

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Keep the features of maps ``(B, C, h, w)``."""
        self.rows[index] = pooled(x) if self.is_pooled else flattened(x)

    def close_batch(self, number: int, n_images: int) -> None:
        """Do nothing: the widths do not depend on the images."""

    def result(self) -> dict[int, Tensor]:
        """Return the features by the number of the tap."""
        return self.rows
