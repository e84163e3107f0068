"""Time that an analysis takes to read, decode and transform its images, beside the work on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitscope.analyses.spec import Analysis
from vitscope.config import factories
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, WorkUnit
from vitscope.core.probe import Probe
from vitscope.core.run_inputs import FromRun, run_inputs
from vitscope.data.probe_batches import ProbeBatches


@contextmanager
def _reading(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    batches = probe.batches.source.cached("none", probe.device)
    yield lambda: batches[0]


#: one batch is read anew, which files of the operating system's cache make faster than the first time
READING = WorkUnit("reading of images", _reading, forwards=0)


def reading_works(analysis: Analysis, probe: Probe, cost: MeasureCost, sizes: Mapping[str, int]) -> list[Work]:
    """Return the reading of the images: once where they are kept, else with every pass; nothing for batches of another source.

    Args:
        analysis: What would be measured.
        probe: A probe of all images of the analysis.
        cost: The cost of the analysis without the reading.
        sizes: Sizes of the arguments that the run supplies: training and validation images are read too.
    """
    if not isinstance(probe.batches.source, ProbeBatches):
        return []
    kinds = run_inputs(analysis.measure)
    others = sum(n for name, n in sizes.items() if kinds[name] in (FromRun.TRAINING, FromRun.VALIDATION))
    if not probe.batches.is_read_again:
        return [Work(READING, Count.exactly(1), probe.n_images + others)]
    passes = [
        Work(READING, work.repeats.times(1 / work.n_sharing), work.n_images, work.is_divided)
        for work in cost.works
        if work.unit.forwards and not work.is_check
    ]
    return [*passes, Work(READING, Count.exactly(1), others)] if others else passes


def keeping_images(cfg: DictConfig) -> DictConfig:
    """Return the configuration with which pieces of work are timed: without the reading of images, which counts by itself."""
    if factories.image_cache(cfg) != "none":
        return cfg
    timed_cfg: Any = copy.deepcopy(cfg)
    OmegaConf.update(timed_cfg, "probe.cache", "auto", force_add=True)
    return timed_cfg
