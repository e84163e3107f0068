"""Index of the runs of a report: configurations, metrics and scalars of results; arrays are read when they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity, loading
from vitscope.reports import entry_index
from vitscope.reports.entry_index import EntryIndex
from vitscope.reports.run_entry import Entry
from vitscope.reports.run_files import read_entry
from vitscope.runs.run_dir import Run
from vitscope.runtime import redaction
from vitscope.runtime.errors import VitscopeError


@dataclass(frozen=True)
class Damage:
    """A run folder that a report leaves out.

    Attributes:
        path: The folder.
        why: Description of the damage.
    """

    path: Path
    why: str

    def __str__(self) -> str:
        """Return the line of standard error."""
        return redaction.masked(" ".join(f"damaged: {self.path}: {self.why}; left out".split()))


def collect(runs: Sequence[Run], damaged: list[Damage] | None = None, root: Path | None = None) -> list[Entry]:
    """Return the entries of ``runs`` with their labels, runs of one experiment together, by data, label and seed.

    Args:
        runs: Run folders.
        damaged: List to which unreadable folders are added; they are left out. None: the first one raises its error.
        root: Folder of all the runs, whose index spares reading those that are unchanged (`vitscope.reports.entry_index`); None
            reads each run's files.

    Where an experiment was run twice with one seed, the newest finished run counts and the others are superseded.
    """
    index = None if root is None or damaged is None else EntryIndex(root)
    entries = [entry for run in runs if (entry := _readable(run, damaged, index)) is not None]
    if index is not None:
        index.save()
    return labeled(entries)


def labeled(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries with their labels, their names, and which of them are superseded, in the order of `collect`.

    No two folders have one name: of ``seed0/vit`` and ``seed1/vit`` these are the names, and not ``vit``.
    """
    labels, names = _labels(entries), _names({entry.run.path for entry in entries})
    counting: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        best = counting.setdefault((entry.group, entry.seed), entry)
        if _rank(entry) >= _rank(best):
            counting[entry.group, entry.seed] = entry
    counting_paths = {entry.run.path for entry in counting.values()}
    labeled = [
        replace(
            entry,
            label=labels[entry.group],
            superseded=entry.trained and entry.run.path not in counting_paths,
            name=names[entry.run.path],
        )
        for entry in entries
    ]
    return sorted(labeled, key=lambda e: (e.data, e.family, _natural(e.label), e.group, e.superseded, e.seed, e.id))


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the name of each folder, with as many of the folders above it as tell it from others of that name."""
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(path.name, []).append(path)
    names: dict[Path, str] = {}
    for same_name in alike.values():
        for path in same_name:
            depth = next(
                n for n in itertools.count(1) if [other.parts[-n:] for other in same_name].count(path.parts[-n:]) == 1
            )
            names[path] = "/".join(path.parts[-depth:])
    return names


def _labels(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the name of each experiment by its digest; no two are equal.

    Those that differ in where their weights come from alone have one configuration, and this in their names.
    """
    starts = {e.group: experiment_identity.start_text(e.config, e.facts) if e.trained else "" for e in entries}
    twins = {
        e.group: loading.digest(experiment_identity.experiment(e.config, {})) if starts[e.group] else e.group
        for e in entries
    }
    of_configs = experiment_identity.labels({twins[e.group]: e.config for e in entries})
    untrained = {e.group for e in entries if e.untrained}
    labels: dict[str, str] = {}
    for group, start in starts.items():
        words = [of_configs[twins[group]], start, "random weights" if group in untrained else ""]
        label = ", ".join(filter(None, words))
        n_equal = sum(other == label or other.startswith(f"{label}, no. ") for other in labels.values())
        labels[group] = f"{label}, no. {n_equal + 1}" if start and n_equal else label
    return labels


def _rank(entry: Entry) -> tuple[bool, str, str]:
    return entry.status == "finished", str(entry.facts.get("created", "")), entry.id


def _natural(text: str) -> tuple[Any, ...]:
    parts = [part for part in text.replace(",", " ").split() if part]
    return tuple((0, float(p), "") if p.replace(".", "", 1).isdecimal() else (1, 0.0, p) for p in parts)


def _readable(run: Run, damaged: list[Damage] | None, index: EntryIndex | None) -> Entry | None:
    """Return a run's entry, None for a damaged one; whatever is derived from it is tried here, not in a table."""
    signature = None if index is None else entry_index.signature(run)
    if index is not None and signature is not None:
        if (known_entry := index.entry(run, signature)) is not None:
            return known_entry
        index.begin()
    try:
        entry = read_entry(run, whole=damaged is not None)
        _ = (entry.seed, entry.status, entry.family, entry.kin, entry.data, entry.untrained, entry.tags(), _rank(entry))
        experiment_identity.labels({entry.group: entry.config})
        if index is not None and signature is not None:
            index.add(run, signature, entry)
        return entry
    except Exception as error:  # a stranger's folder may hold anything
        if damaged is None:
            raise
        damaged.append(Damage(run.path, _reason(error)))
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, VitscopeError):
        return f"{error.value}: {error.why}" if error.value is not None else error.why
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
