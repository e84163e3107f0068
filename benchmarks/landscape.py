"""A loss landscape against its limit, the bare forward passes over the same batches, and against the usual loop.

Three sides take turns in one process, each for a whole n x n grid: `forward`, nothing but the model's forward passes;
`vitscope`, `vs.loss_landscape` with everything it does (directions, moves, L2 surfaces, accuracy, ECE); `state_dict`, a
copy of the state dict, its sum with both directions and `load_state_dict` at each point, then the loss. With `--half`
a fourth, vitscope with `dtype=bfloat16`, where the processor has such instructions. Correctness comes first: both loops
must agree, and the weights must be back bit for bit.

A sample during which other processes used more than 0.1 core is left out; without an undisturbed sample no ratio is
given. Memory is the growth of the process's own pages (of the allocator's peak on a GPU) over that of the forward passes,
in units of the parameters' size: the goal is at most 2.

    python benchmarks/landscape.py [--depth 18] [--images 256] [--batch 64] [--n 5] [--rounds 5] [--half]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.linalg.weights.directions import Direction, filter_parameters, moving, normalize, random_direction
from vitscope.runtime import progress

TICK = os.sysconf("SC_CLK_TCK")
FOREIGN = 0.1  # cores

Batches = list[tuple[Tensor, Tensor]]


def forward(model: nn.Module, batches: Batches, n: int) -> None:
    model.eval()
    with torch.no_grad():
        for _ in range(n * n):
            for x, _ in batches:
                model(x)


def state_dict_loop(model: nn.Module, batches: Batches, axes: tuple[Direction, Direction], n: int) -> np.ndarray:
    model.eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    side, nll = np.linspace(-1, 1, n), np.zeros((n, n))
    with torch.no_grad():
        for i, j in np.ndindex(n, n):
            moved = {name: value.clone() for name, value in start.items()}
            for factor, axis in zip((side[i], side[j]), axes):
                for name, d in axis.items():
                    moved[name] += float(factor) * d
            model.load_state_dict(moved)
            losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in batches]
            nll[i, j] = float(torch.stack(losses).sum()) / sum(len(y) for _, y in batches)
    model.load_state_dict(start)
    return nll


def directions(model: nn.Module) -> tuple[Direction, Direction]:
    parameters = dict(model.named_parameters())
    filters = filter_parameters(model)
    first, second = (
        normalize(random_direction(moving(parameters), 0, k), parameters, "filter", filters) for k in (0, 1)
    )
    return first, second


def busy() -> tuple[float, float]:
    """Return CPU seconds used so far by the whole machine and by this process."""
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    everything = (sum(fields) - fields[3] - fields[4]) / TICK  # all but idle and waiting
    own = os.times()
    return everything, own.user + own.system


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return wall seconds, and the cores that other processes used meanwhile."""
    before, started = busy(), time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, after = time.perf_counter() - started, busy()
    return wall, max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / wall


def peak(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory in bytes while working: the allocator's, or the process's anonymous pages (sampled)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device))
    # the allocator keeps freed pages, which would count for whichever side runs first
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    highest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            line = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
            )
            highest = max(highest, 1024.0 * int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest


def check(model: nn.Module, probe: vs.Probe, batches: Batches, axes: tuple[Direction, Direction], n: int) -> None:
    """Refuse to time sides that disagree or leave other weights behind."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = vs.loss_landscape(probe, n=n).nll
    if not all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        raise SystemExit("vitscope left other weights behind")
    expected = state_dict_loop(model, batches, axes, n)
    # both loops add in float32 in another order; deep networks amplify that far from the minimum
    if not np.allclose(found, expected, rtol=1e-3, equal_nan=True):
        raise SystemExit(f"the two loops disagree by up to {np.nanmax(np.abs(found - expected)):.3g}")
    print(f"agreement of the two loops: {np.nanmax(np.abs(found / expected - 1)):.1e} relative; weights bit-identical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("depth", 18), ("images", 256), ("batch", 64), ("n", 5), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--half", action="store_true")
    options = parser.parse_args()
    progress.enabled = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = vs.models.convnet(depth=options.depth, num_classes=10, image_size=32).to(device)
    x, y = torch.randn(options.images, 3, 32, 32, device=device), torch.randint(10, (options.images,), device=device)
    batches = list(zip(x.split(options.batch), y.split(options.batch)))
    probe, axes, n = vs.Probe(model, batches), directions(model), options.n
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"ResNet-{options.depth}, {size / 4e6:.1f}M parameters, {options.images} images, {n}x{n} points, {device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    check(model, probe, batches, axes, n)
    sides: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, batches, n),
        "vitscope": lambda: vs.loss_landscape(probe, n=n),
        "state_dict": lambda: state_dict_loop(model, batches, axes, n),
    }
    if options.half:
        sides["vitscope bfloat16"] = lambda: vs.loss_landscape(probe, n=n, dtype="bfloat16")
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, work in sides.items():
            samples[name].append(timed(work, device))
    report(samples, n * n * options.images)
    if options.half:
        print(f"error of bfloat16: {vs.loss_landscape(probe, n=n, dtype='bfloat16').dtype_error:.2e} nats at most")
    lowest = peak(sides["forward"], device)
    print(
        f"memory of vitscope beside the model: {(peak(sides['vitscope'], device) - lowest) / size:.2f} parameter sizes"
    )


def report(samples: dict[str, list[tuple[float, float]]], images: int) -> None:
    """Print medians over undisturbed samples, and ratios to the forward passes."""
    limit = None
    for name, values in samples.items():
        kept = [wall for wall, foreign in values if foreign <= FOREIGN]
        if not kept:
            print(f"{name:18s} no undisturbed sample of {len(values)}: no number given")
            continue
        median = statistics.median(kept)
        limit = median if name == "forward" else limit
        ratio = f"{median / limit:.3f}x the forward passes" if limit else "no limit to compare with"
        print(
            f"{name:18s} {median:8.3f} s  {images / median:8.0f} images/s  {ratio}  ({len(kept)} of {len(values)} samples)"
        )


if __name__ == "__main__":
    main()
