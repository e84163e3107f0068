"""Train three networks by three optimizers at full batch, and collect their largest Hessian eigenvalues over steps.

Usage: python docs/scripts/stability_runs.py --data FOLDER [--runs build/stability] [--only NETWORK-OPTIMIZER ...]
       [--at-steps STEP ... --series FILE]

  --data      folder that holds ``cifar-10-batches-py``, CIFAR-10 encoded again as JPEG
  --runs      where the run folders are; those that are finished are not trained again
  --only      such as ``convnet-sgd``
  --at-steps  steps that are measured in place of every sixth
  --series    file of the series; by default ``docs/gallery/series/edge_of_stability.json``, from which
              ``docs/scripts/draw_curvature.py`` draws

The series of all finished runs are written to the file. One run takes about 1.5 minutes of one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vitscope as vs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts.draw_gallery import checksums

SERIES = ROOT / "docs" / "gallery" / "series" / "edge_of_stability.json"
NETWORKS = {
    "convnet": ("ConvNet", ["model=convnet", "model.width=8"]),
    "vit": ("ViT", ["model=vit", "model.depth=3", "model.width=48", "model.heads=3"]),
    "alternet": ("AlterNet", ["model=alternet", "model.width=8", "model.dim_head=8", "model.heads=[1,1,2,4]"]),
}
#: name of each optimizer and its settings, without the learning rate
OPTIMIZERS = {
    "sgd": ("SGD", ["optimizer=sgd", "optimizer.momentum=0"]),
    "momentum": ("SGD, momentum 0.9", ["optimizer=sgd", "optimizer.momentum=0.9"]),
    "adamw": ("AdamW", ["optimizer=adamw"]),
}
#: base learning rates, found with short runs so that the sharpness begins below the limit and can reach it within the steps
RATES = {
    "convnet": {"sgd": 0.01, "momentum": 0.003, "adamw": 2e-3},
    "vit": {"sgd": 0.015, "momentum": 0.003, "adamw": 2e-4},
    "alternet": {"sgd": 0.01, "momentum": 0.006, "adamw": 1e-3},
}
N_STEPS = 120
#: 10 training images of each class; 1 step is 1 epoch
SETTINGS = [
    "data=cifar10_jpeg", "data.fraction=0.00223", "data.batch_size=100", "data.recipe.drop_path=0", "objective.weight_decay=0",
    f"trainer.max_steps={N_STEPS}", "trainer.check_val_every_n_epoch=100000", "callbacks.checkpoint.every_n_epochs=100000",
    "optimizer.schedule={kind:multistep,warmup_epochs:0,milestones:[90],gamma:0.5,per_epoch:false}",
    "analysis.edge_of_stability.probe.n_images=null", "analysis.edge_of_stability.probe.batch_size=100",
    "analysis.edge_of_stability.bn=batch", "analysis.edge_of_stability.k=1",
]  # fmt: skip
#: fields of a series that figures need
FIELDS = ("steps", "sharpness", "sharpness_error", "sharpness_converged", "limit", "lr")


def train(network: str, optimizer: str, data: Path, run: Path, at_steps: Sequence[int]) -> None:
    """Train one network and measure it at some steps, or at every sixth; its run folder has the series."""
    every = 0 if at_steps else 6
    when = [
        f"analysis.edge_of_stability.when.{key}" for key in (f"every_n_steps={every}", f"at_steps={list(at_steps)}")
    ]
    words = [
        sys.executable, str(ROOT / "train.py"), "experiment=edge_of_stability", *NETWORKS[network][1],
        *OPTIMIZERS[optimizer][1], f"optimizer.lr={RATES[network][optimizer]}", *SETTINGS, *when,
        f"data.root={data.resolve()}", checksums(data), "trainer.accelerator=cpu", "logger=none", f"run_dir={run}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"failed: {network}-{optimizer}; its folder is {run}")


def series_of(run: Path) -> dict[str, Any]:
    """Return the series of a finished run and the loss of its steps, as plain lists."""
    file = max((run / "results" / "edge_of_stability").glob("*.npz"), key=lambda path: path.stat().st_mtime)
    result = vs.load_result(file)
    values = {name: _rounded(getattr(result, name)) for name in FIELDS}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return {**values, "formula": result.formula, "first_loss": losses[0], "last_loss": losses[-1]}


def _rounded(values: np.ndarray) -> list[Any]:
    """Return numbers of five digits; None for those that are not finite, which JSON has not."""
    return [
        value if isinstance(value, bool | int) else float(f"{value:.5g}") if np.isfinite(value) else None
        for value in values.tolist()
    ]


def main(arguments: Sequence[str]) -> int:
    """Train what is missing and write the series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "stability")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--at-steps", nargs="*", type=int, default=[])
    parser.add_argument("--series", type=Path, default=SERIES)
    options = parser.parse_args(arguments)
    collected = json.loads(options.series.read_text(encoding="utf-8")) if options.series.is_file() else {}
    for optimizer in OPTIMIZERS:
        for network in NETWORKS:
            name = f"{network}-{optimizer}"
            run = (options.runs / name).resolve()
            if options.only and name not in options.only:
                continue
            if not (run / "checkpoints" / "last.ckpt").is_file():
                train(network, optimizer, options.data, run, options.at_steps)
            collected[name] = series_of(run)
            options.series.parent.mkdir(parents=True, exist_ok=True)
            options.series.write_text(json.dumps(collected) + "\n", encoding="utf-8")
            print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
