"""The predicted time of analyses (``analyze.py ... cost=true``) against the time that they take.

Both are processor times of one thread, which other work on the machine changes less than wall times. The analyses are the default
ones (hessian, landscape, slice, fourier) and corruption, with their default settings but for the number of images, on a network
that was trained for some steps. A search for eigenvalues ends when they are known: beside its prediction stands the one for the
number of products that it made, which is what the timed product can answer for.

    python benchmarks/cost.py [--models vit convnet] [--steps 40] [--images 128]
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

import vitscope.runtime.progress
from vitscope.analyses import cost_prediction, spec
from vitscope.config import factories, loading
from vitscope.core.cost.measure_cost import Count, all_options, cost_of

ANALYSES = ("hessian", "landscape", "slice", "fourier", "corruption")
MODELS = {
    "vit": ["model=vit", "model.depth=2", "model.patch_size=8"],
    "convnet": ["model=convnet", "model.depth=18"],
    "alternet": ["model=alternet"],
}


def trained(cfg: DictConfig, data: Any, n_steps: int) -> nn.Module:
    """Return the network after some steps of Adam on the training images."""
    torch.manual_seed(0)
    network = factories.model(cfg)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = data.probe_batches(split="train", n_images=16 * 32, batch_size=32)
    for step in range(n_steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def measured(cfg: DictConfig, analysis: spec.Analysis, network: nn.Module, data: Any) -> tuple[float, Any]:
    """Return the processor seconds of a measurement, and its result."""
    probe = factories.probe(cfg, network, data, spec.probe_request(analysis, data))
    before = time.process_time()
    result = analysis.measure(probe, **analysis.options)
    return time.process_time() - before, result


def with_counted_products(
    analysis: spec.Analysis, cost: cost_prediction.PredictedCost, result: Any, probe_facts: Any
) -> float | None:
    """Return the prediction for the products that a search made; None for analyses without products."""
    n_products = int(np.sum(getattr(result, "n_products", 0)))
    if not n_products or cost.units is None:
        return None
    formula = cost_of(analysis.measure, all_options(analysis.measure, analysis.options), probe_facts)
    assert formula is not None
    works = [replace(w, repeats=Count.exactly(n_products)) if w.unit.is_product else w for w in formula.works]
    exact = cost_prediction.combined(analysis.name, replace(formula, works=works), cost.units, probe_facts.n_images)
    assert exact.seconds is not None
    return exact.seconds.expected


def compare(name: str, n_steps: int, n_images: int) -> None:
    """Print a row for each analysis of a model."""
    chosen = ",".join(ANALYSES)
    limits = [f"analysis.{a}.probe.n_images={n_images}" for a in ("fourier", "corruption")]
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        cfg = compose("analyze", overrides=[*MODELS[name], "data=photos", f"analysis=[{chosen}]", *limits])
    data = factories.data(cfg)
    network = trained(cfg, data, n_steps)
    for analysis in spec.parse(cfg.analysis):
        (cost,) = cost_prediction.predict_costs(cfg, [analysis], network, data)
        if cost.seconds is None:
            print(f"{name:10} {analysis.name:11} unknown: {cost.reason}")
            continue
        seconds, result = measured(cfg, analysis, network, data)
        request = spec.probe_request(analysis, data)
        probe = factories.probe(cfg, network, data, request)
        facts = cost_prediction.workload(probe, request["batch_size"], probe.n_images)
        exact = with_counted_products(analysis, cost, result, facts)
        text = f"predicted {cost.seconds.expected:8.1f} s, took {seconds:8.1f} s ({cost.seconds.expected / seconds - 1:+.0%})"
        if exact is not None:
            made = int(np.sum(result.n_products))
            text += f"; for the {made} products made {exact:.1f} s ({exact / seconds - 1:+.0%})"
        print(f"{name:10} {analysis.name:11} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit", "convnet"], choices=MODELS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    vitscope.runtime.progress.enabled = False
    cost_prediction.clock = time.process_time
    for name in arguments.models:
        compare(name, arguments.steps, arguments.images)


if __name__ == "__main__":
    main()
