"""Time of a trial of a sweep before it trains: from the start of its process to the end of its first training step.

    python benchmarks/sweep.py --trials 4

Runs `make sweep-local`'s command on a grid of seeds (AlterNet-18 on photos, W&B offline, batches of 16), one trial at a time
and two side by side, and reads when each process was started from the sweep's journal and when its first step was logged
from the run's: the figures include that step. Goal: under 8 s with one trial on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from vitscope.runs import metrics_log

SWEEP = """
program: train.py
project: vitscope
method: grid
metric: {name: val/accuracy, goal: maximize}
parameters:
  model: {value: alternet}
  seed: {values: %s}
  profile: {value: smoke}
  analysis: {value: "[]"}
  test: {value: false}
  trainer.max_epochs: {value: 1}
  trainer.limit_train_batches: {value: %d}
  trainer.log_every_n_steps: {value: 1}
command: ["${env}", python, "${program}", "${args_no_hyphens}"]
"""
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    for jobs in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            starts, paces = run(Path(place), jobs, options.trials, options.steps)
        print(
            f"{jobs} side by side, {len(starts)} trials on {len(os.sched_getaffinity(0))} cores: first step after "
            f"{np.median(starts):.2f} s (median; {min(starts):.2f} to {max(starts):.2f}), then {np.median(paces):.2f} s a step"
        )


def run(place: Path, jobs: int, trials: int, steps: int) -> tuple[list[float], list[float]]:
    """Return each trial's seconds to its first step, and its median seconds between steps."""
    file = place / "sweep.yaml"
    file.write_text(SWEEP % (list(range(trials)), steps))
    command = [sys.executable, "-m", "vitscope", "sweep", str(file), f"jobs={jobs}"]
    env = {**os.environ, "VITSCOPE_RUNS": str(place / "runs"), "WANDB_MODE": "offline"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    (folder,) = (place / "runs" / "sweeps").iterdir()
    rows = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    begun = {row["trial"]: row["time"] for row in rows if row["event"] == "start"}
    starts, paces = [], []
    for trial, at in sorted(begun.items()):
        (run_folder,) = folder.glob(f"{trial:03d}-*")
        times = [row["time"] for row in metrics_log.read(run_folder / "metrics.jsonl") if "train/loss" in row]
        starts.append(times[0] - at)
        paces.append(float(np.median(np.diff(times))))
    return starts, paces


if __name__ == "__main__":
    main()
