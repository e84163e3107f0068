"""Measure two networks of a study, a ConvNet and a ViT, for the figures of curvature in the gallery.

Usage: python docs/scripts/curvature_results.py --runs FOLDER [--out build/curvature] [--only MEASURE ...]

  --runs  run folders of ``make table-claims PROFILE=cifar10_small``, with seeds 0 and 1 of both networks
  --out   where the results are kept, each a file ``<measure>-<network>.npz``; those that are there are not measured again

Run folders are only read. Barriers, exponents and ``blocks`` together take about 8 minutes of one CPU thread; ``blocks_unscaled``
and ``blocks_symlog`` each take as long as ``blocks``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import vitscope as vs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import study_runs

FAMILIES = ("convnet", "vit")
#: training images of the measures of the Hessian, not augmented
N_IMAGES = 32
#: test images of the barrier
N_TEST_IMAGES = 512


def measure_barrier(paths: Sequence[Path]) -> Any:
    """Measure the barrier between the two seeds with and without matched units, BatchNorm's statistics recomputed."""
    probe = vs.load_probe(paths[1], n_images=N_TEST_IMAGES, batch_size=128)
    ends = [(f"seed {seed}", vs.load_probe(path, n_images=8).model.state_dict()) for seed, path in enumerate(paths)]
    has_bn = any(isinstance(module, torch.nn.BatchNorm2d) for module in probe.model.modules())
    return vs.loss_barrier(
        probe, checkpoints=ends, start="seed 0", end="seed 1", n=11, alignment="weights",
        bn="recalibrate" if has_bn else "eval",
    )  # fmt: skip


def _training_probe(paths: Sequence[Path]) -> vs.Probe:
    """Return the network of seed 0 on training images; without weight decay, which moves all eigenvalues by as much."""
    loaded = vs.load_probe(paths[0], split="train", n_images=N_IMAGES, batch_size=N_IMAGES)
    objective = dataclasses.replace(loaded.objective, weight_decay=0.0, l2="none")
    return vs.Probe(loaded.model, list(loaded.iter_batches()), objective, about=loaded.about)


def _measure_blocks(paths: Sequence[Path], **options: Any) -> Any:
    return vs.hessian_block_densities(_training_probe(paths), n_vectors=2, n_steps=10, n_resamples=200, **options)


MEASURES: dict[str, Callable[[Sequence[Path]], Any]] = {
    "barrier": measure_barrier,
    "exponents": lambda paths: vs.curvature_exponents(_training_probe(paths), n_singular_values=10),
    "exponents_ggn": lambda paths: vs.curvature_exponents(_training_probe(paths), n_singular_values=10, operator="ggn"),
    "blocks": lambda paths: _measure_blocks(paths, scale="largest"),
    "blocks_unscaled": lambda paths: _measure_blocks(paths, scale="none"),
    "blocks_symlog": lambda paths: _measure_blocks(paths, axis="symlog"),
}


def main(arguments: Sequence[str]) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "curvature")
    parser.add_argument("--only", nargs="*", default=list(MEASURES), choices=list(MEASURES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = study_runs.finished_runs(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    for measure in options.only:
        for family in FAMILIES:
            file = options.out / f"{measure}-{family}.npz"
            runs = [study_runs.find_run(entries, family, seed) for seed in (0, 1)]
            if None in runs:
                print(f"missing: a finished {family} of seeds 0 and 1 in {options.runs}", file=sys.stderr)
                return 3
            if not file.is_file():
                MEASURES[measure]([entry.run.path for entry in runs if entry is not None]).save(file)
            print(file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
