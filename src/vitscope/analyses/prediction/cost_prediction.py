"""Prediction of what analyses cost before they start: every piece of work is timed once, and formulas say how often it is done.

The formulas stand beside the measures (`vitscope.core.cost.measure_cost`). A piece of work is done with one batch of the
analysis's own images: a first time to warm up, some times to be timed and once more to count the bytes that it takes. Nothing is
measured and nothing is written. Analyses that share a forward pass are predicted as if each made its own.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vitscope.analyses import arguments
from vitscope.analyses.prediction.image_reading import keeping_images, reading_works
from vitscope.analyses.spec import Analysis, probe_request
from vitscope.config import factories
from vitscope.core.cost.image_passes import tap_sizes
from vitscope.core.cost.measure_cost import (
    Count,
    MeasureCost,
    UnknownCost,
    Work,
    Workload,
    WorkUnit,
    all_options,
    stated_cost,
    workload_of,
)
from vitscope.core.cost.tensor_memory import peak_bytes
from vitscope.core.probe import Probe
from vitscope.runtime import stop_flag
from vitscope.runtime.stop_flag import Interrupted

#: a piece of work is repeated for this long, seconds, or `MOST_REPEATS` times; the median counts
TIMED_S = 0.5
MOST_REPEATS = 5

#: seconds of a piece of work from which its first time counts: the warming of caches is a small part of it
LONG_S = 2.0

#: products with one batch that an analysis is expected to make before one is timed at its start, which adds about a tenth at most
LEAST_PRODUCTS = 20

#: seconds; a name of its own so that tests can set the time
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class UnitCost:
    """Measured time and memory of a piece of work.

    Attributes:
        seconds: Time of one.
        n_bytes: Bytes of the tensors that it allocates, at most at once.
        n_images: Number of images that it was timed with.
    """

    seconds: float
    n_bytes: float
    n_images: int


@dataclass(frozen=True)
class PredictedCost:
    """Predicted cost of an analysis for one process.

    Attributes:
        name: The analysis's name.
        seconds: Time, with its bounds where the number of repeats is not known before; None where it is unknown.
        peak_bytes: Bytes of the device: the model and its batch, what is held beside it and the largest piece of work; None where
            they are unknown.
        forward_passes: Number of forward passes over the analysis's images.
        products: Number of products with the curvature.
        result_bytes: Bytes of the result's arrays before compression; None where they are unknown.
        reason: Why the cost is unknown; empty where it is known.
        units: What each piece of work took, by its name.
    """

    name: str
    seconds: Count | None = None
    peak_bytes: float | None = None
    forward_passes: Count | None = None
    products: Count | None = None
    result_bytes: float | None = None
    reason: str = ""
    units: Mapping[str, UnitCost] | None = None


def predict_costs(
    cfg: DictConfig,
    analyses: Sequence[Analysis],
    network: nn.Module,
    data: Any,
    *,
    n_ranks: int = 1,
    content: Mapping[str, Any] | None = None,
    n_checkpoints: int = 0,
) -> list[PredictedCost]:
    """Return the predicted cost of every analysis.

    Args:
        cfg: Validated configuration: the objective and the seed.
        analyses: What would be measured.
        network: The network on its device; it is given back as it was.
        data: Data module.
        n_ranks: Number of processes that would share the work.
        content: Checkpoint of the weights, for an objective that needs the optimizer's state.
        n_checkpoints: Number of the run's own checkpoints.
    """
    predictor = _Predictor(cfg, network, data, content, n_ranks, n_checkpoints)
    return [predictor.predict(analysis) for analysis in analyses]


def predict_times(
    cfg: DictConfig,
    analyses: Sequence[Analysis],
    network: nn.Module,
    data: Any,
    content: Mapping[str, Any] | None = None,
) -> dict[str, Count]:
    """Return the predicted seconds of the analyses that are expected to make at least `LEAST_PRODUCTS` products.

    One product is made with one batch, or several for half a second where it is short; gradients and checks, which are few, are
    taken to be as long.

    Args:
        cfg: That of `predict_costs`, and likewise the others.
        analyses: What will be measured.
        network: The network on its device; it is given back as it was.
        data: Data module.
        content: Checkpoint of the weights.

    Returns:
        Seconds by analysis; those that make fewer products, or have no formula, are left out.
    """
    predictor = _Predictor(cfg, network, data, content, in_short=True)
    costs = [predictor.predict(analysis) for analysis in analyses]
    return {cost.name: cost.seconds for cost in costs if cost.seconds is not None}


@dataclass
class _Predictor:
    """Predicts one analysis after the other; a piece of work that several of them do is timed once.

    Attributes:
        cfg: That of `predict_costs`, and likewise the others.
        network: The network on its device.
        data: Data module.
        content: Checkpoint of the weights.
        n_ranks: Number of processes that would share the work.
        n_checkpoints: Number of the run's own checkpoints.
        in_short: Whether one product stands for all pieces of work, as in `predict_times`; no bytes are counted then.
        times: Costs of the pieces of work that have been timed.
    """

    cfg: DictConfig
    network: nn.Module
    data: Any
    content: Mapping[str, Any] | None
    n_ranks: int = 1
    n_checkpoints: int = 0
    in_short: bool = False
    times: dict[Any, UnitCost] = field(default_factory=dict)

    def predict(self, analysis: Analysis) -> PredictedCost:
        """Return the predicted cost of an analysis, or why it is unknown."""
        request = probe_request(analysis, self.data)
        options = all_options(analysis.measure, analysis.options)
        try:
            available = len(self.data.split(request["split"]))
            n_images = available if request["n_images"] is None else min(available, int(request["n_images"]))
            cost = self._stated_cost(analysis, request, n_images)
        except Interrupted:
            raise
        except UnknownCost as error:
            return PredictedCost(analysis.name, reason=str(error))
        except Exception as error:  # the analysis itself reports it
            return PredictedCost(analysis.name, reason=_line(error))
        if self.in_short and _batch_products(cost, min(n_images, request["batch_size"])) < LEAST_PRODUCTS:
            return PredictedCost(analysis.name, reason="few products")
        # in short: gradients and checks, which are few, are taken to be as long as a product
        product = next((work.unit for work in cost.works if work.unit.is_product), None) if self.in_short else None
        units: dict[str, UnitCost] = {}
        for work in cost.works:
            unit = product or work.unit
            try:
                units[work.unit.name] = self._unit_cost(unit, request, options, n_images)
            except Interrupted:
                raise
            except Exception as error:  # likewise
                return PredictedCost(analysis.name, reason=f"{unit.name}: {_line(error)}")
        return combined(analysis.name, cost, units, n_images, self.n_ranks, model_bytes(self.network))

    def _stated_cost(self, analysis: Analysis, request: Mapping[str, Any], n_images: int) -> MeasureCost:
        """Return the counts that the measure's formula gives, and the reading of images beside them."""
        probe = self._probe(self.cfg, request, n_images, request["batch_size"])
        sizes = arguments.input_sizes(analysis, self.cfg, self.network, self.data, self.n_checkpoints)
        work = replace(workload(probe, request["batch_size"], n_images), input_sizes=sizes)
        cost = stated_cost(analysis.measure, analysis.options, work)
        if self.in_short:
            return cost
        return replace(cost, works=[*cost.works, *reading_works(analysis, probe, cost, sizes)])

    def _unit_cost(
        self, unit: WorkUnit, request: Mapping[str, Any], options: Mapping[str, Any], n_images: int
    ) -> UnitCost:
        """Return what a piece of work takes with one batch of the images that an analysis requests."""
        key = (unit.key(options), tuple(sorted((name, str(value)) for name, value in request.items())))
        if key not in self.times:
            stop_flag.check()
            n_timed = min(n_images, unit.n_timed or request["batch_size"])
            one_batch = self._probe(keeping_images(self.cfg), request, n_timed, n_timed)
            self.times[key] = measure_unit(unit, one_batch, options, count_bytes=not self.in_short)
        return self.times[key]

    def _probe(self, cfg: DictConfig, request: Mapping[str, Any], n_images: int, batch_size: int) -> Probe:
        request = {**request, "n_images": n_images, "batch_size": min(batch_size, n_images)}
        return factories.probe(cfg, self.network, self.data, request, None, self.content)


def _batch_products(cost: MeasureCost, batch_size: int) -> float:
    """Return the number of products with a batch that an analysis is expected to make."""
    return sum(work.repeats.expected * work.n_images / batch_size for work in cost.works if work.unit.is_product)


def measure_unit(unit: WorkUnit, probe: Probe, options: Mapping[str, Any], count_bytes: bool = True) -> UnitCost:
    """Return the time and the bytes of a piece of work.

    Args:
        unit: The piece of work.
        probe: A probe of one batch.
        options: All options of the measure.
        count_bytes: Whether the work is done once more to count its bytes; otherwise they are zero.
    """
    device = probe.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the measurement itself gives them
        with torch.random.fork_rng(devices=[]), unit.prepare(probe, options) as compute:
            first = _timed(compute, device)  # warms caches
            seconds = [first] if first > LONG_S else []
            while not seconds or (sum(seconds) < TIMED_S and len(seconds) < MOST_REPEATS):
                seconds.append(_timed(compute, device))
            n_bytes = peak_bytes(compute, device) if count_bytes else 0.0
    return UnitCost(statistics.median(seconds), n_bytes, probe.n_images)


def combined(
    name: str,
    cost: MeasureCost,
    units: Mapping[str, UnitCost],
    n_images: int,
    n_ranks: int = 1,
    n_model_bytes: float = 0.0,
) -> PredictedCost:
    """Return the cost that a formula's counts and the times of its pieces of work give.

    Args:
        name: The analysis's name.
        cost: Counts of the formula.
        units: Time and bytes by the piece of work's name.
        n_images: Number of images of the analysis.
        n_ranks: Number of processes that share the work.
        n_model_bytes: Bytes of the model.
    """
    total = Count.exactly(0)
    for work in cost.works:
        total += work.repeats.times(_seconds(work, units[work.unit.name], n_ranks))
    if cost.limit_s is not None:
        total = Count(*(min(seconds, cost.limit_s) for seconds in (total.expected, total.low, total.high)))
    largest = max((units[work.unit.name].n_bytes for work in cost.works), default=0.0)
    return PredictedCost(
        name,
        total,
        n_model_bytes + cost.held_bytes + cost.held_bytes_shared / n_ranks + largest,
        cost.forward_images.times(1 / n_images),
        cost.products,
        cost.result_bytes,
        units=dict(units),
    )


def _seconds(work: Work, unit: UnitCost, n_ranks: int) -> float:
    return unit.seconds * work.n_images / unit.n_images / (n_ranks if work.is_divided else 1)


def model_bytes(network: nn.Module) -> float:
    """Return the bytes of a network's parameters and buffers, tied ones once."""
    return float(sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())))


def workload(probe: Probe, batch_size: int, n_images: int) -> Workload:
    """Return what formulas depend on, of a probe whose first batch has images of the same size as all others.

    Args:
        probe: Model and images.
        batch_size: Number of images of a batch.
        n_images: Number of images.
    """
    x, y = next(iter(probe.batches))
    size, map_sizes = (0, 0), None
    few = Probe(probe.model, [(x[:2], y[:2])], probe.objective, about=probe.about, optimizer=probe.optimizer)
    if isinstance(x, torch.Tensor) and x.ndim >= 2:
        size = (int(x.shape[-2]), int(x.shape[-1]))
        with contextlib.suppress(Exception):  # a model without known feature maps has no formula that needs them
            map_sizes = tap_sizes(few)
    return replace(workload_of(probe.model, batch_size, n_images, size, map_sizes), probe=few)


def _timed(compute: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    before = clock()
    compute()
    _wait(device)
    return clock() - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
