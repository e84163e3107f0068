"""Print the contrast of the branches of trained networks and of the same networks before training, as rows of Markdown.

Usage: python docs/scripts/transfer_contrasts.py --runs FOLDER [--images 256]

  --runs    run folders of ``make table-claims PROFILE=cifar10_small``
  --images  test images

The claim's statistic is the difference of the two. A row is a kind of branch of a network, with the mean over the seeds of which
the runs of all networks have finished, and the least and the largest of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import vitscope as vs
from vitscope.reports.run_entry import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import study_runs

FAMILIES = ("convnet", "vit", "pit", "swin", "alternet")
KINDS = ("msa", "conv", "mlp")

#: checkpoint and heading of a column
MOMENTS = {"init": "before training", "last": "trained"}


def contrasts(run: Path, n_images: int) -> dict[tuple[str, str], float]:
    """Return the mean contrast of each kind of branch, in natural logarithms, by kind and checkpoint."""
    values = {}
    for checkpoint in MOMENTS:
        probe = vs.load_probe(run, ckpt=checkpoint, n_images=n_images, batch_size=64)
        scalars = vs.branch_transfer(probe).scalars()  # without initial=: nothing is subtracted
        for kind in KINDS:
            if (value := scalars.get(f"contrast_{kind}")) is not None:
                values[kind, checkpoint] = value
    return values


def rows(runs: Path, n_images: int) -> list[str]:
    """Return a row for each network and kind of branch."""
    entries = study_runs.finished_runs(runs)
    seeds = [
        seed for seed in sorted({entry.seed for entry in entries}) if len(_runs_of_seed(entries, seed)) == len(FAMILIES)
    ]
    lines = ["| network | branch | seeds | " + " | ".join(MOMENTS.values()) + " |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        by_seed = [contrasts(_runs_of_seed(entries, seed)[family], n_images) for seed in seeds]
        for kind in KINDS:
            cells = [
                _mean_and_range([values[kind, moment] for values in by_seed if (kind, moment) in values])
                for moment in MOMENTS
            ]
            if any(cells):
                lines.append(f"| {study_runs.NAMES[family]} | {kind} | {len(by_seed)} | {' | '.join(cells)} |")
    return lines


def _runs_of_seed(entries: Sequence[Entry], seed: int) -> dict[str, Path]:
    found = {family: study_runs.find_run(entries, family, seed, "branch_transfer") for family in FAMILIES}
    return {family: entry.run.path for family, entry in found.items() if entry is not None}


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def main(arguments: Sequence[str]) -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args(arguments)
    print("\n".join(rows(options.runs, options.images)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
