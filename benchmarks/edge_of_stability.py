"""The cost of the largest Hessian eigenvalue along training: CPU time of the measurements over that of the training alone.

Each model makes steps of its optimizer on crops of photographs, and every n steps `vs.edge_of_stability` measures the largest
eigenvalues of 64 of them, from the eigenvectors of the step before (warm) or from the gradient (cold). Correctness first: the
last warm and cold eigenvalue must agree to the tolerance of 1 %. Both parts run on one thread and are timed by the CPU time of
the process, which other processes on the machine change by the share of the caches alone. Goal: a ratio of at most 1.

    python benchmarks/edge_of_stability.py [--models convnet vit] [--optimizers sgd adamw] [--steps 500] [--every 10] [--k 1 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from hessian import data
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import vitscope as vs
from vitscope.diagnostics.preconditioned_hessian.edge_of_stability import EdgeOfStabilityResult

MODELS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: ResNet(BasicBlock, layers=(2, 2, 2, 2), channels=(16, 32, 64, 128), num_classes=16),
    "vit": lambda: vs.models.vit(num_classes=16, image_size=32, patch_size=8, depth=6, heads=2, dim_head=32),
    "resnet18": lambda: vs.models.convnet(depth=18, num_classes=16, image_size=32),
}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
}


def measure(
    model_name: str, optimizer_name: str, k: int, warm: bool, arguments: argparse.Namespace
) -> EdgeOfStabilityResult:
    """Train with measurements, print a row, and return the series."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    x, y = data(1024, torch.device("cpu"))
    probe = vs.Probe(model, [(x[: arguments.images], y[: arguments.images])])
    generator = torch.Generator().manual_seed(0)
    training, measuring, series = [], [], None
    for step in range(1, arguments.steps + 1):
        rows = torch.randint(len(x), (arguments.batch,), generator=generator)
        start = time.process_time()
        model.train()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.append(time.process_time() - start)
        if step % arguments.every == 0:
            start = time.process_time()
            series = vs.edge_of_stability(probe, k=k, optimizer=optimizer, step=step, previous=series, warm_start=warm)
            measuring.append(time.process_time() - start)
    assert series is not None
    first = 1 if len(measuring) > 2 else 0  # the first measurement checks the model
    ratio = statistics.mean(measuring[first:]) / (arguments.every * statistics.mean(training))
    start_name = "warm" if warm else "cold"
    print(
        f"| {model_name} | {optimizer_name} | {k} | {start_name} | {sum(training):.1f} s | {sum(measuring):.1f} s | "
        f"{series.n_products[first:].mean():.1f} | {series.converged.mean():.2f} | {ratio:.2f} |",
        flush=True,
    )
    return series


def main() -> None:
    """Print a row a model, optimizer, number of eigenvalues and start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnet", "vit"], choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=OPTIMIZERS)
    parser.add_argument("--k", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | optimizer | k | start | training | measuring | products | converged | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model_name in arguments.models:
        for optimizer_name in arguments.optimizers:
            for k in arguments.k:
                warm, cold = (measure(model_name, optimizer_name, k, warm, arguments) for warm in (True, False))
                difference = abs(warm.eigenvalues[-1, 0] / cold.eigenvalues[-1, 0] - 1)
                if difference > 2e-2:
                    raise SystemExit(f"{model_name}, {optimizer_name}: warm and cold differ by {difference:.1%}")


if __name__ == "__main__":
    main()
