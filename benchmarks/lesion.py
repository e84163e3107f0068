"""Time that is saved by starting each lesioned pass at the block it changes; the numbers are compared first.

Each round times, one after the other in one process, ``lesion(cache=False)`` and ``lesion(cache=True)`` on the same model and
images (``branch_zero`` of every unit, ``conv3x3_identity`` and ``stage`` where they exist). The gain is the median over rounds
of the quotient of the two. Of n equally costly blocks a cached pass runs the last half on average, so the gain nears 2 for
many blocks; less where costly stages come first or stem and head weigh much. Rounds during which other processes used more
than 0.1 core are left out, unless that leaves none.

    python benchmarks/lesion.py [--models vit convnet alternet swin] [--rounds 3] [--images 64] [--batch 32]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import fields

import numpy as np
import torch

import vitscope as vs
import vitscope.runtime.progress

TICK = os.sysconf("SC_CLK_TCK")
FOREIGN = 0.1  # cores
MODELS = {
    "vit": lambda: vs.models.vit(patch_size=4),
    "convnet": lambda: vs.models.convnet(50),
    "alternet": lambda: vs.models.alternet(50),
    "swin": lambda: vs.models.swin(patch_size=2, window_size=4),
}


def probe_of(name: str, images: int, batch: int) -> vs.Probe:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, y = torch.randn(images, 3, 32, 32), torch.randint(0, 10, (images,))
    return vs.Probe(model, list(zip(x.split(batch), y.split(batch))))


def busy() -> float:
    """Return the CPU seconds of the machine's other processes so far."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *_ = (int(n) for n in file.readline().split()[1:])
    own = os.times()
    return (user + nice + system + irq + softirq) / TICK - own.user - own.system


def timed(probe: vs.Probe, cache: bool) -> tuple[object, float, float]:
    """Return the result, the seconds it took, and how many cores others used meanwhile."""
    before, start = busy(), time.perf_counter()
    result = vs.lesion(probe, cache=cache)
    seconds = time.perf_counter() - start
    return result, seconds, max(0.0, busy() - before) / seconds


def largest_difference(a: object, b: object) -> float:
    values = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    arrays = [(x, y) for x, y in values if isinstance(x, np.ndarray) and x.size]
    return max(float(np.abs(x - y).max()) for x, y in arrays)


def compare(name: str, rounds: int, images: int, batch: int) -> None:
    probe = probe_of(name, images, batch)
    gains: list[tuple[float, float]] = []
    for index in range(rounds):
        full, slow, load = timed(probe, cache=False)
        cached, fast, load_cached = timed(probe, cache=True)
        difference = largest_difference(full, cached)
        if difference > 0:  # the same operations on the same numbers
            raise SystemExit(f"{name}: cached and full passes differ by {difference:g}")
        gains.append((slow / fast, max(load, load_cached)))
        if index == 0:
            print(f"{name}: {len(full.units)} units, {images} images, largest difference {difference:g}; ", end="")
            print(f"full {slow:.2f} s, cached {fast:.2f} s in the first round", flush=True)
    quiet = [gain for gain, load in gains if load <= FOREIGN]
    used = quiet or [gain for gain, _ in gains]
    note = "" if quiet else ", every round disturbed"
    print(
        f"  gain {statistics.median(used):.2f} x ({min(used):.2f} to {max(used):.2f}, n = {len(used)}{note})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vitscope.runtime.progress.enabled = False
    for name in arguments.models:
        compare(name, arguments.rounds, arguments.images, arguments.batch)


if __name__ == "__main__":
    main()
