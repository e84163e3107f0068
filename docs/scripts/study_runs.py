"""Find the runs of a study that figures of the documentation are drawn from; run folders are only read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity
from vitscope.reports import run_index
from vitscope.reports.run_entry import END, Entry
from vitscope.runs import run_search

#: names in figures of the families that are drawn
NAMES = {"convnet": "ConvNet", "vit": "ViT", "pit": "PiT", "swin": "Swin", "alternet": "AlterNet"}


def finished_runs(folder: Path) -> list[Entry]:
    """Return the finished trainings below a folder; damaged ones and those that a later run repeats are left out."""
    entries = run_index.collect(run_search.every(folder), damaged=[])
    return [e for e in entries if e.trained and e.status == "finished" and not e.superseded]


def find_run(
    entries: Sequence[Entry], family: str, seed: int, analysis: str | None = None, mixer: str = "msa"
) -> Entry | None:
    """Return a family's run on all data for the whole training, weakly augmented, with attention at stage ends.

    Args:
        entries: The result of `finished_runs`.
        family: One of `NAMES`.
        seed: The run's seed.
        analysis: An analysis that the run must have at the end of training.
        mixer: What an AlterNet has in the places of its attention.
    """
    matching = [
        entry
        for entry in entries
        if entry.kin == family
        and entry.seed == seed
        and _is_plain(entry)
        and _model_option(entry, "mixer", "msa") == mixer
        and (analysis is None or measured_file(entry, analysis) is not None)
    ]
    return matching[0] if matching else None


def common_seed(entries: Sequence[Entry], families: Sequence[str]) -> int | None:
    """Return the lowest seed of which every family has a run; None where there is none."""
    seeds = sorted({entry.seed for entry in entries})
    return next((s for s in seeds if all(find_run(entries, family, s) for family in families)), None)


def measured_file(entry: Entry, analysis: str) -> Path | None:
    """Return the file of an analysis's newest result at the end of training, None where there is none."""
    results = [m for m in entry.results if m.analysis == analysis and m.tag == END and not m.error]
    return max(results, key=lambda m: m.time).path if results else None


def _is_plain(entry: Entry) -> bool:
    data, trainer = entry.config.get("data") or {}, entry.config.get("trainer") or {}
    return (
        float(data.get("fraction") or 1.0) == 1.0
        and not data.get("random_labels")
        and (trainer.get("max_steps") or -1) < 0
        and experiment_identity.recipe(entry.config) == "weak"
        and _model_option(entry, "placement", "stage_end") == "stage_end"
    )


def _model_option(entry: Entry, key: str, default: Any) -> Any:
    value = (entry.config.get("model") or {}).get(key)
    return default if value is None else value
