"""Print the block structure of networks before and after training, and the change, as rows of Markdown.

Usage: python docs/scripts/untrained_blocks.py --data FOLDER [--study FOLDER]

  --data   folder of the study's images, data.root of its trainings
  --study  committed study; default: results/cifar10_small

A network before training is built from the configuration and the seed of its run, and measured on the same images with the same
options as the trained one, whose number is in the study. A row is a network, with the mean over its seeds, the least and the
largest value of them, and the 95 % t-interval of the change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

import vitscope as vs
from vitscope.config import factories
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.claims import claim_statistics
from vitscope.reports.claims.effect_sizes import ReportRuns, lowest_seed_run
from vitscope.reports.exports import study_export
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.value_lookup import Selection
from vitscope.stats.t_tests import t_interval

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "cifar10_small"
TARGET = "table-claims"
SCALAR = "block_structure"


def structure_before_training(entry: Entry, card: ObjectiveCard, data: Path) -> float:
    """Return the block structure of a run's network with its initial weights, under the conditions of a card."""
    cfg = OmegaConf.create(dict(entry.config))
    cfg.data.root = str(data)
    network = factories.model(cfg)
    datamodule = factories.data(cfg)
    datamodule.adapt_to(network)
    datamodule.setup("test")
    images = {"split": card.split, "augment": False, "n_images": card.n_images, "batch_size": card.batch_size}
    options = {key: value for key, value in (card.options or {}).items() if value is not None}
    return vs.cka(factories.probe(cfg, network, datamodule, images), **options).scalars()[SCALAR]


def rows(study: Path, data: Path) -> list[str]:
    """Return a row for each network of several stages whose block structure the study has."""
    selection = Selection(study_export.read(study, TARGET))
    runs = ReportRuns(selection, Costs())
    has_stages = claim_statistics.has_stages(runs, "cka")
    lines = ["| network | seeds | before training | trained | change [95 % interval] |", "|---|---|---|---|---|"]
    for by_seed in runs.groups(has_stages):
        before, trained = [], []
        for _, entry in sorted(by_seed.items()):
            for result in entry.results:
                if result.analysis == "cka" and result.card is not None and not result.error:
                    before.append(structure_before_training(entry, result.card, data))
                    trained.append(result.scalars[SCALAR])
        if trained:
            change = t_interval([b - a for a, b in zip(before, trained)])
            cells = (
                lowest_seed_run(by_seed).label,
                str(len(trained)),
                _mean_and_range(before),
                _mean_and_range(trained),
                f"{change.mean:.3f} [{change.low:.3f}, {change.high:.3f}]",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(arguments: Sequence[str]) -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, default=STUDY)
    options = parser.parse_args(arguments)
    print("\n".join(rows(options.study, options.data)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
