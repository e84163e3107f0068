"""Cost of probes by depth: passes that collect features, and classifiers on features of the same sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from vitscope.core.cost.image_passes import EVALUATION, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.probe import Probe
from vitscope.diagnostics.depth_probes._features import collect
from vitscope.diagnostics.depth_probes._logit_lens import Head, find_head
from vitscope.diagnostics.depth_probes._tap_measurement import TapImages, measure_tap

#: bytes of a feature that is kept
FEATURE = 4


@contextmanager
def _collection(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    head = _head(probe)  # which is searched once, however many images there are
    yield lambda: collect(probe, probe.taps, head, None, "timed")


#: a pass that keeps pooled features at all taps
COLLECTION = WorkUnit("pass that keeps features", _collection)


def _head(probe: Probe) -> Head | None:
    with probe.guard() as model:
        return find_head(model, next(probe.iter_batches())[0], probe.taps)


def depth_probes_cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a pass over the images, one over the training images, and the classifiers of each tap.

    Classifiers are timed on random features as many and as wide as those of the taps, once for each width.
    """
    probe, n_train = workload.model_probe(), workload.input_size(options, "train")
    images = collect(probe, probe.taps, _head(probe), None, "timed")
    with probe.guard() as model:
        n_classes = int(model(next(probe.iter_batches())[0]).shape[1])
    widths: Counter[tuple[int, int]] = Counter()  # of pooled features and of class tokens
    for index in range(len(probe.taps)):
        pooled, tokens = (images.gathered(name, index) for name in ("pooled", "class_tokens"))
        assert pooled is not None
        widths[pooled.shape[1], 0 if tokens is None else tokens.shape[1]] += 1
    works = [
        Work(EVALUATION, Count.exactly(1), workload.first_batch, is_divided=False),  # the search for the head
        Work(COLLECTION, Count.exactly(1), workload.n_images + n_train),
        *guard_checks(workload),
    ]
    if n_train:
        works += guard_checks(workload, n_images=min(workload.first_batch, n_train))
    for (width, token_width), n_taps in widths.items():
        sizes = (n_train, workload.n_images, width, token_width, n_classes)
        unit = WorkUnit(
            f"classifiers of {width} channels", partial(_classifiers, sizes), ("n_neighbors",), forwards=0, n_timed=1
        )
        works.append(Work(unit, Count.exactly(n_taps), 1))
    n_entries = sum(n * (width + token_width) for (width, token_width), n in widths.items())
    return MeasureCost(works, held_bytes=float(FEATURE * n_entries * (workload.n_images + n_train)))


@contextmanager
def _classifiers(
    sizes: tuple[int, int, int, int, int], probe: Probe, options: Options
) -> Iterator[Callable[[], object]]:
    n_train, n_test, width, token_width, n_classes = sizes
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> TapImages:
        pooled = torch.randn(n, width, generator=generator, dtype=torch.float64)
        tokens = torch.randn(n, token_width, generator=generator, dtype=torch.float64) if token_width else None
        labels = torch.arange(n) % n_classes
        return TapImages(labels, labels, pooled, tokens, None, None, None)

    train, test = (drawn(n_train) if n_train else None), drawn(n_test)
    yield lambda: measure_tap(train, test, int(options["n_neighbors"]))
