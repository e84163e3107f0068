"""Images a second of the strong CIFAR pipeline, against timm's loader over the same bytes.

Both sides hold the same 32x32 images in memory as bytes and give normalized float32 batches of 96 with soft
targets: padded random crop, flip, RandAugment rand-m9-n2-mstd1.0, mixup 1.0 or CutMix 0.8, smoothing 0.1.
timm's side is `create_loader` with its prefetcher and `FastCollateMixup`, its random resized crop replaced by
the padded crop of the recipe.

The sides take turns in one process. A sample during which other processes used more than 0.1 core is marked
as disturbed and left out of the medians, unless that leaves none: then all are used and the line says so. CPU
time an image depends less on what else runs.

    python benchmarks/data.py [--rounds 7] [--batches 40] [--workers 0 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.loader import create_loader
from timm.data.mixup import FastCollateMixup
from torchvision import transforms

from vitscope.data import DataModule
from vitscope.data.sources import photos

BATCH = 96
TICK = os.sysconf("SC_CLK_TCK")
STRONG = {"augment": "rand-m9-n2-mstd1.0", "mixup": 1.0, "cutmix": 0.8, "switch_prob": 0.5, "label_smoothing": 0.1}


class Bytes(torch.utils.data.Dataset):
    """The same images, one by one, as timm wants them."""

    transform: Any = None

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def vitscope_batches(workers: int) -> Iterator[Any]:
    data = DataModule(num_workers=workers, batch_size=BATCH, drop_last=True, **STRONG)
    loader = data.train_dataloader()
    for epoch in range(10**6):
        loader.batch_sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            yield data.mixed(x, y, (0, epoch, step))


def timm_batches(workers: int, device: torch.device = torch.device("cpu")) -> Iterator[Any]:  # noqa: B008  a constant
    split, data = photos.load("train"), DataModule()
    dataset = Bytes(split.images, split.labels)
    mixing = FastCollateMixup(1.0, 0.8, switch_prob=0.5, label_smoothing=0.1, num_classes=16)
    loader = create_loader(
        dataset,
        (3, 32, 32),
        BATCH,
        is_training=True,
        auto_augment=STRONG["augment"],
        color_jitter=None,
        mean=data.mean,
        std=data.std,
        num_workers=workers,
        collate_fn=mixing,
        device=device,
        persistent_workers=workers > 0,
    )
    resized_crop, *rest = dataset.transform.transforms
    assert "ResizedCrop" in type(resized_crop).__name__, resized_crop
    dataset.transform = transforms.Compose([transforms.RandomCrop(32, padding=4), *rest])
    while True:
        yield from loader


@dataclass
class Side:
    """One pipeline and its samples."""

    name: str
    workers: int
    batches: Iterator[Any]
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def sample(self, n: int) -> None:
        """Take `n` batches and note speed, CPU time and what other processes used meanwhile."""
        busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
        for _ in range(n):
            next(self.batches)
        wall = time.perf_counter() - start
        used = own_seconds() - own
        self.rates.append(n * BATCH / wall)
        self.cpu.append(used / (n * BATCH) * 1e6)
        self.foreign.append(max(0.0, busy_seconds() - busy - used) / wall)

    def line(self) -> tuple[float, float]:
        """Print the medians; return images a second and CPU microseconds an image."""
        quiet = [index for index, load in enumerate(self.foreign) if load <= 0.1]
        kept = quiet or range(len(self.rates))
        rate = statistics.median(self.rates[index] for index in kept)
        cpu = statistics.median(self.cpu[index] for index in kept)
        note = f"n={len(quiet)} of {len(self.rates)}" if quiet else f"n={len(self.rates)}, all disturbed"
        span = f"{min(self.rates):,.0f} to {max(self.rates):,.0f}"
        print(
            f"{self.name:10s} workers={self.workers}  {rate:8,.0f} images/s ({span})  {cpu:6.1f} us CPU/image  {note}"
        )
        return rate, cpu


def busy_seconds() -> float:
    """Seconds that all processors together have worked since the start of the machine."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft) / TICK


def own_seconds() -> float:
    """Seconds that this process and its children have worked."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(") ", 1)[1].split()
        except OSError:  # ended meanwhile
            continue
        if entry.parent.name == str(os.getpid()) or fields[1] == str(os.getpid()):
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} CPUs, torch {torch.__version__}, batch {BATCH}, one thread a process")
    for workers in options.workers:
        sides = [Side("vitscope", workers, vitscope_batches(workers)), Side("timm", workers, timm_batches(workers))]
        for side in sides:  # the first batches start workers and fill caches
            for _ in range(2 + 4 * workers):
                next(side.batches)
        for _ in range(options.rounds):
            for side in sides:
                side.sample(options.batches)
        (ours, our_cpu), (theirs, their_cpu) = (side.line() for side in sides)
        print(
            f"{'ratio':10s} workers={workers}  {ours / theirs:8.2f} x images/s{' ':20s}{their_cpu / our_cpu:6.2f} x less CPU"
        )
        del sides


if __name__ == "__main__":
    main()
