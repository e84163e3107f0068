"""Cost of comparing the features of all images, whose time grows with a power of their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from vitscope.core.cost.measure_cost import Count, Options, Work, Workload, WorkUnit
from vitscope.core.feature_pass import Accumulator, run_feature_pass
from vitscope.core.probe import Probe
from vitscope.diagnostics.cka._representations import FeatureStore


class FeatureSums(Accumulator, Protocol):
    """An accumulator that keeps the features of all images.

    Attributes:
        store: The features; None where none are compared.
        n_images: Number of images.
    """

    store: FeatureStore | None
    n_images: int


#: makes an accumulator of a probe, the names of measures and the options
MakeSums = Callable[[Probe, tuple[str, ...], Options], FeatureSums]


def comparison_work(make_sums: MakeSums) -> Callable[[Workload, Options], list[Work] | None]:
    """Return the formula of the comparison of all images; the formula gives None where CKA alone is measured.

    It is timed on random features as many and as wide as those of the taps.

    Args:
        make_sums: Makes the accumulator of the measures that compare the features of all images.
    """

    def formula(workload: Workload, options: Options) -> list[Work] | None:
        measures = [options["measure"]] if isinstance(options["measure"], str) else options["measure"]
        compared = tuple(name for name in measures if name != "cka")
        if not compared:
            return None

        @contextmanager
        def comparing(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
            features = _random_features(make_sums(probe, compared, options), probe, workload.n_images)

            def compare() -> object:
                sums = make_sums(probe, compared, options)
                assert sums.store is not None
                sums.store.add(0, features)
                sums.n_images = workload.n_images
                return sums.result()

            yield compare

        unit = WorkUnit("comparison of the features of all images", comparing, forwards=0, n_timed=1)
        return [Work(unit, Count.exactly(1), 1)]

    return formula


def _random_features(sums: FeatureSums, probe: Probe, n_images: int) -> list[torch.Tensor]:
    run_feature_pass(probe, [sums], "feature maps")
    assert sums.store is not None
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n_images, x.shape[1], generator=generator, dtype=x.dtype) for x in sums.store.first_features()]
