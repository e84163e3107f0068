"""Prediction of the time of analyses when they start: one forward pass is timed, and one product where many follow.

Gradients and statistics of feature maps are not timed here, since that would take as long as some analyses: ``cost=true`` does
so (`vitscope.analyses.prediction.cost_prediction`), by the same formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vitscope.analyses.spec import Analysis, probe_request
from vitscope.core.cost.image_passes import EVALUATION, RECALIBRATED_EVALUATION
from vitscope.core.cost.measure_cost import Count, cost_of, workload_of
from vitscope.runtime.distributed import world_size
from vitscope.runtime.text_layout import duration_text

#: options that keep the time of a measure within a limit, by its name
_LIMITS = {"hessian_max_eigenvalue_spectrum": "budget_s=60"}

#: seconds of an analysis from which the option that limits it is named
_LONG_S = 90.0

#: images of the pass that is timed on a CPU, where the time of an image hardly depends on how many there are
_TIMED_IMAGES = 16

#: seconds; a name of its own so that tests can set the time
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Prediction:
    """Times of the analyses of a command.

    Attributes:
        seconds: Predicted time by analysis, of forward passes alone.
        unpredicted: Analyses without a prediction.
        measured: Analyses that have a result already.
        limits: Option that limits the time of an analysis that is long or not predicted, by its name.
        product_seconds: Predicted time of analyses of products, with its bounds.
    """

    seconds: Mapping[str, float]
    unpredicted: Sequence[str]
    measured: Sequence[str]
    limits: Mapping[str, str]
    product_seconds: Mapping[str, Count] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the prediction in words."""
        parts = []
        if self.seconds:
            times = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in self.seconds.items())
            parts.append(f"predicted time (one forward pass timed): {times}")
        if self.product_seconds:
            times = ", ".join(
                f"{name} {duration_text(count.expected)} (at most {duration_text(count.high)}{self._limit(name, '; ')})"
                for name, count in self.product_seconds.items()
            )
            parts.append(f"predicted time (one product timed): {times}")
        if self.unpredicted:
            limits = ", ".join(filter(None, (self._limit(name, "") for name in self.unpredicted)))
            hint = f" ({limits})" if limits else ""
            parts.append(f"no prediction for {', '.join(self.unpredicted)}{hint}")
        if self.measured:
            parts.append(f"already measured: {', '.join(self.measured)}")
        return "; ".join(parts) or "nothing to measure"

    def _limit(self, name: str, separator: str) -> str:
        return f"{separator}analysis.{name}.{self.limits[name]} sets a limit" if name in self.limits else ""


def predict(
    analyses: Sequence[Analysis],
    network: nn.Module,
    data: Any,
    measured: Sequence[str] = (),
    time_products: Callable[[Sequence[Analysis]], Mapping[str, Count]] | None = None,
) -> Prediction:
    """Return the predicted times of analyses.

    Args:
        analyses: What will be measured.
        network: The network on its device; modes and random states are left as they are.
        data: Data module.
        measured: Names of analyses that have a result already.
        time_products: Function that returns the seconds of those of the other analyses whose products can be timed
            (`vitscope.analyses.prediction.cost_prediction.predict_times`); None to time forward passes alone.
    """
    seconds: dict[str, float] = {}
    per_image: dict[tuple[Any, ...], float | None] = {}
    remaining = [analysis for analysis in analyses if analysis.name not in measured]
    for analysis in remaining:
        request = probe_request(analysis, data)
        n_images = _n_images(data, request)
        image_passes = _evaluated_images(analysis, network, request, n_images)
        if image_passes is None:
            continue
        key = tuple(sorted((name, str(value)) for name, value in request.items() if name != "n_images"))
        if key not in per_image:
            per_image[key] = _seconds_per_image(network, data, request)
        if (time_of_image := per_image[key]) is not None:
            seconds[analysis.name] = image_passes * time_of_image / world_size()
    others = [analysis for analysis in remaining if analysis.name not in seconds]
    products = dict(time_products(others)) if time_products is not None else {}
    limits = {
        analysis.name: _LIMITS[analysis.measure.__name__]
        for analysis in others
        if analysis.measure.__name__ in _LIMITS
        and not analysis.options.get("budget_s")
        and (analysis.name not in products or products[analysis.name].expected > _LONG_S)
    }
    unpredicted = [analysis.name for analysis in others if analysis.name not in products]
    return Prediction(seconds, unpredicted, list(measured), limits, products)


def _evaluated_images(
    analysis: Analysis, network: nn.Module, request: Mapping[str, Any], n_images: int | None
) -> float | None:
    """Return the images that an analysis evaluates, repeats counted; None where it does something else too.

    The guard's passes over the first batch are left out.
    """
    if n_images is None or analysis.options.get("dtype") is not None:
        return None
    cost = cost_of(analysis.measure, analysis.options, workload_of(network, request["batch_size"], n_images))
    works = [] if cost is None else [work for work in cost.works if not work.is_check]
    if not works or any(work.unit not in (EVALUATION, RECALIBRATED_EVALUATION) for work in works):
        return None
    return sum(work.repeats.expected * work.n_images * work.unit.forwards for work in works)


def _n_images(data: Any, request: Mapping[str, Any]) -> int | None:
    try:
        available = len(data.split(request["split"]))
    except Exception:  # the analysis itself reports it
        return None
    return available if request["n_images"] is None else min(available, request["n_images"])


def _seconds_per_image(network: nn.Module, data: Any, request: Mapping[str, Any]) -> float | None:
    """Return the seconds of a forward pass, divided by its images; None where the network cannot take them."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in network.modules()]
    try:
        most = _TIMED_IMAGES if device.type == "cpu" else request["batch_size"]
        batch_size = min(most, request["batch_size"], len(data.split(request["split"])))
        batches = data.probe_batches(split=request["split"], n_images=batch_size, batch_size=batch_size)
        x = batches[0][0].to(device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.eval()
            _synchronized(network, x, device)  # warms caches
            before = clock()
            _synchronized(network, x, device)
            return (clock() - before) / len(x)
    except Exception:  # whatever a network or a data set raises, the analysis itself reports it
        return None
    finally:
        for module, mode in modes:
            module.training = mode


def _synchronized(network: nn.Module, x: torch.Tensor, device: torch.device) -> None:
    network(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
