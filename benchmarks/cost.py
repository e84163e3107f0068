"""The predicted time of analyses (``analyze.py ... cost=true``) against the time that they take.

Both are processor times of one thread, which other work on the machine changes less than wall times. The main analyses are the
default ones (hessian, landscape, slice, fourier) and corruption, with their default settings but for the number of images, on a
network that was trained for some steps; all others have the small settings of `cost_settings.py`. A search for eigenvalues ends
when they are known: beside its prediction stands the one for the number of products that it made, which is what the timed product
can answer for. ``--bytes`` counts the tensors of each measurement, on a second run, beside the predicted peak.

    python benchmarks/cost.py [--models vit convnet] [--analyses main] [--steps 40] [--images 128] [--bytes]
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from cost_settings import SETTINGS
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

import vitscope.runtime.progress
from vitscope.analyses import arguments, spec
from vitscope.analyses.prediction import cost_prediction
from vitscope.config import factories, loading
from vitscope.core.cost.measure_cost import cost_of
from vitscope.core.cost.tensor_memory import peak_bytes
from vitscope.core.run_inputs import FromRun, run_inputs
from vitscope.linalg.curvature.curvature_operator import Curvature

MAIN = ("hessian", "landscape", "slice", "fourier", "corruption")
MODELS = {
    "vit": ["model=vit", "model.depth=2", "model.patch_size=8"],
    "convnet": ["model=convnet", "model.depth=18"],
    "small_convnet": ["model=convnet", "model.depth=18", "model.width=16"],
    "alternet": ["model=alternet"],
}


@dataclass(frozen=True)
class TrainedNetwork:
    """A network after some steps, and what a run would keep of them.

    Attributes:
        cfg: Configuration, with all chosen analyses.
        data: Data module.
        network: The network.
        checkpoints: The network's weights before and during the steps.
        content: What a checkpoint holds of the optimizer.
    """

    cfg: DictConfig
    data: Any
    network: nn.Module
    checkpoints: Sequence[tuple[str, Mapping[str, Any]]]
    content: Mapping[str, Any]


def trained(cfg: DictConfig, n_steps: int) -> TrainedNetwork:
    """Return the network after some steps of Adam on the training images."""
    data = factories.data(cfg)
    torch.manual_seed(cfg.seed)
    network = factories.model(cfg)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = data.probe_batches(split="train", n_images=16 * 32, batch_size=32)
    checkpoints = []
    for step in range(n_steps):
        if step in (0, n_steps // 2):
            checkpoints.append((f"step {step}", {name: value.clone() for name, value in network.state_dict().items()}))
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad(set_to_none=True)
    return TrainedNetwork(cfg, data, network.eval(), checkpoints, {"optimizer_states": [optimizer.state_dict()]})


def measurement(run: TrainedNetwork, analysis: spec.Analysis) -> Callable[[], Any]:
    """Return the function that measures, with what a run would supply."""
    supply: dict[FromRun, Callable[[Any], Any]] = {
        FromRun.CHECKPOINTS: lambda value: run.checkpoints,
        FromRun.VALIDATION: lambda value: _clean_images(run, "val", {}),
        FromRun.TRAINING: lambda value: _clean_images(run, "train", value or {}),
        FromRun.UNTRAINED: lambda value: arguments.untrained_model(run.cfg, run.network),
    }
    request = spec.probe_request(analysis, run.data)
    probe = factories.probe(run.cfg, run.network, run.data, request, None, run.content)
    options = dict(analysis.options)
    for name, kind in run_inputs(analysis.measure).items():
        if kind in supply:
            options[name] = supply[kind](options.get(name))
    return lambda: analysis.measure(probe, **options)


def _clean_images(run: TrainedNetwork, split: str, images: Mapping[str, Any]) -> Any:
    request = {"n_images": None, "batch_size": run.data.eval_batch_size, **images, "split": split, "augment": False}
    return factories.probe(run.cfg, run.network, run.data, request)


def with_counted_products(
    run: TrainedNetwork, analysis: spec.Analysis, cost: cost_prediction.PredictedCost, n_products: int
) -> float:
    """Return the seconds of the prediction with the products that a search made in place of the expected ones."""
    request = spec.probe_request(analysis, run.data)
    probe = factories.probe(run.cfg, run.network, run.data, request, None, run.content)
    workload = cost_prediction.workload(probe, request["batch_size"], probe.n_images)
    formula = cost_of(analysis.measure, analysis.options, workload)
    assert formula is not None
    assert cost.units is not None
    share = n_products / formula.products.expected
    works = [replace(w, repeats=w.repeats.times(share)) if w.unit.is_product else w for w in formula.works]
    exact = cost_prediction.combined(analysis.name, replace(formula, works=works), cost.units, probe.n_images)
    assert exact.seconds is not None
    return exact.seconds.expected


def row(run: TrainedNetwork, analysis: spec.Analysis, counts_bytes: bool) -> Iterator[str]:
    """Yield the parts of an analysis's row: what was predicted and what it took."""
    (cost,) = cost_prediction.predict_costs(
        run.cfg, [analysis], run.network, run.data, content=run.content, n_checkpoints=len(run.checkpoints)
    )
    if cost.seconds is None or cost.products is None:
        yield f"unknown: {cost.reason}"
        return
    measure = measurement(run, analysis)
    with counted_products() as n_products:
        before = time.process_time()
        measure()
        seconds = time.process_time() - before
    yield f"predicted {cost.seconds.expected:7.2f} s, took {seconds:7.2f} s, ratio {cost.seconds.expected / seconds:5.2f}"
    if cost.products.low < cost.products.high:
        exact = with_counted_products(run, analysis, cost, n_products())
        yield f"for the {n_products()} products made {exact:.2f} s, ratio {exact / seconds:.2f}"
    if counts_bytes and cost.peak_bytes is not None:
        peak = peak_bytes(measure, torch.device("cpu")) + cost_prediction.model_bytes(run.network)
        yield f"predicted {cost.peak_bytes / 1e6:.1f} MB, took {peak / 1e6:.1f} MB, ratio {cost.peak_bytes / peak:.2f}"


@contextmanager
def counted_products() -> Iterator[Callable[[], int]]:
    """Yield the function that returns the number of products with the curvature that were made inside."""
    operators: list[Curvature] = []
    make = Curvature.__init__

    def make_noted(operator: Curvature, *values: Any, **options: Any) -> None:
        make(operator, *values, **options)
        operators.append(operator)

    with mock.patch.object(Curvature, "__init__", make_noted):
        yield lambda: sum(operator.n_products for operator in operators)


def compare(model: str, chosen: Sequence[str], n_steps: int, n_images: int, counts_bytes: bool) -> None:
    """Print a row for each analysis of a model."""
    overrides: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for name in chosen:
        data, options = _overrides(model, name, n_images)
        if options is not None:
            overrides.setdefault(data, []).extend(options)
            names.setdefault(data, []).append(name)
    for data in names:
        with initialize_config_dir(str(loading.folder()), version_base="1.3"):
            analyses = f"analysis=[{','.join(names[data])}]"
            cfg = compose("analyze", overrides=[*MODELS[model], f"data={data}", analyses, *overrides[data]])
        run = trained(cfg, n_steps)
        for analysis in spec.parse(cfg.analysis):
            try:
                for part in row(run, analysis, counts_bytes):
                    print(f"{model:8} {analysis.name:26} {part}", flush=True)
            except Exception:
                print(f"{model:8} {analysis.name:26} failed: {traceback.format_exc()}", flush=True)


def _overrides(model: str, name: str, n_images: int) -> tuple[str, list[str] | None]:
    """Return the data and the overrides of an analysis; None in their place where it does not apply to the model."""
    if name not in SETTINGS:
        is_limited = name in ("fourier", "corruption")
        return "photos", [f"analysis.{name}.probe.n_images={n_images}"] if is_limited else []
    setting = SETTINGS[name]
    n = setting.n_images
    if setting.models and model not in setting.models:
        return setting.data, None
    batch = [] if setting.batch_size is None else [f"probe.batch_size={min(setting.batch_size, n)}"]
    return setting.data, [f"analysis.{name}.{text}" for text in (f"probe.n_images={n}", *batch, *setting.options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit", "convnet"], choices=MODELS)
    parser.add_argument("--analyses", nargs="+", default=["main"], help="main, all (the others), or names")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=128, help="of fourier and corruption")
    parser.add_argument("--bytes", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    vitscope.runtime.progress.enabled = False
    cost_prediction.clock = time.process_time
    if not arguments.bytes:
        cost_prediction.peak_bytes = lambda compute, device: 0  # which takes as long as the timing
    groups = {"main": MAIN, "all": tuple(SETTINGS)}
    chosen = [name for group in arguments.analyses for name in groups.get(group, (group,))]
    for model in arguments.models:
        compare(model, chosen, arguments.steps, arguments.images, arguments.bytes)


if __name__ == "__main__":
    main()
