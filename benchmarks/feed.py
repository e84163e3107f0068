"""The image feed of a loss surface over a folder of JPEG files: images read, bytes kept and seconds, for each place of a cache.

    python benchmarks/feed.py --images 256 --n 9

Writes a folder of JPEG photographs of 500x375 pixels in two classes, then measures an n x n loss surface of a small network at
224 pixels with `probe.cache` none, host and disk, and with none and one point a pass, which is how surfaces were measured before
batches stayed while the weights changed. The surfaces must be equal bit for bit. One thread, so that reading is compared with one
core's arithmetic.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from torch import nn

import vitscope as vs
from vitscope.core import weight_space
from vitscope.data import DataModule
from vitscope.data.sources import file_images, folder
from vitscope.runtime import progress

SIZE = (500, 375)
#: by what is printed: ``probe.cache``, and the points that share a pass without a cache
CASES = {
    "none, a point a pass": ("none", 1),
    "none": ("none", weight_space.MOST_POINTS_A_PASS),
    "host": ("host", 1),
    "disk": ("disk", 1),
}


def write_images(root: Path, n: int) -> None:
    """Write crops of photographs as JPEG files."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(photographs.astronaut()), Image.fromarray(photographs.coffee())]
    for i in range(n):
        source = sources[i % 2]
        left, top = (int(rng.integers(0, max(1, side - 300))) for side in source.size)
        path = root / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.crop((left, top, left + 300, top + 225)).resize(SIZE).save(path, quality=90)


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Yield a counter of the files that are decoded in the block."""
    counts: Counter[str] = Counter()
    read_image = file_images.read_image

    def counting(path: str, **options: object) -> Image.Image:
        counts[str(path)] += 1
        return read_image(path, **options)

    file_images.read_image = counting
    try:
        yield counts
    finally:
        file_images.read_image = read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--n", type=int, default=9, help="points on a side of the surface")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    progress.enabled = False
    network = nn.Sequential(
        nn.Conv2d(3, 8, 16, stride=16), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).eval()  # fmt: skip
    cpu = torch.device("cpu")
    surfaces = {}
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root), arguments.images)
        for name, (cache, most) in CASES.items():
            weight_space.MOST_POINTS_A_PASS = most
            data = DataModule(folder.load, name="folder", root=root, num_classes=2, image_size=224, eval_batch_size=64)
            batches = data.probe_batches("train", n_images=arguments.images, batch_size=64).cached(cache, cpu)
            probe = vs.Probe(network, batches)
            before, started = time.process_time(), time.perf_counter()
            with counted_reads() as counts:
                surfaces[name] = vs.loss_landscape(probe, n=arguments.n).nll
            seconds, processor = time.perf_counter() - started, time.process_time() - before
            n_bytes, n_reads = 0 if cache == "none" else batches.n_bytes, sum(counts.values()) / batches.n_images
            kept = f"{n_reads:.1f} reads an image, {n_bytes / 2**20:.0f} MiB kept"
            print(f"probe.cache={name}: {kept}, wall {seconds:.1f} s, processor {processor:.1f} s", flush=True)
    first = next(iter(surfaces.values()))
    if not all(np.array_equal(first, other) for other in surfaces.values()):
        raise SystemExit("the surfaces differ")
    print(f"{arguments.n} x {arguments.n} surfaces of {arguments.images} images: equal bit for bit")


if __name__ == "__main__":
    main()
