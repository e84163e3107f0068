"""A study as small JSON files for a repository: configurations, metrics, scalars, cards and hashes, no weights and no arrays.

The tables and figures of numbers that were drawn from the runs are drawn from it again: ``vitscope reproduce table-claims
from=results/cifar10_small``. Seeds that were trained elsewhere are further parts of a study, which `read` and `join` put
together (`vitscope.reports.exports.study_parts`). `vitscope.reports.exports.study_files` has the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports import run_index
from vitscope.reports.exports import study_files, study_parts
from vitscope.reports.exports.study_files import Study
from vitscope.reports.measured_results import Measured
from vitscope.reports.run_entry import Entry
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import DataError

#: entries of ``provenance.json`` that are exported: what reports read, and what produced the numbers
FACTS = (
    "status", "command", "created", "seed", "config_hash", "git_commit", "model", "wall_s", "versions", "started_from", "changes",
)  # fmt: skip
#: results whose meaning hangs on a text that is not among their scalars: the measure and its field
TEXTS = {"branch_transfer": "reference"}
_CARD_KEYS = {f.name for f in fields(ObjectiveCard)}


def write(folder: Path, profile: str, targets: Mapping[str, Sequence[Entry]]) -> int:
    """Write a study; return the size of its files in bytes. A study that stands there is replaced.

    Args:
        folder: Where to; a new folder, or one that holds a study.
        profile: Profile of the reproduction.
        targets: Runs of each target, with the results that it reads.

    Raises:
        ConfigError: The folder holds something else.
    """
    entries: dict[str, Entry] = {}
    results: dict[str, dict[str, Measured]] = {}
    for entry in (entry for of_target in targets.values() for entry in of_target):
        entries.setdefault(_key(entry), entry)
        results.setdefault(_key(entry), {}).update({_name(m): m for m in entry.results})
    names = {name: {_key(e): sorted(map(_name, e.results)) for e in of_target} for name, of_target in targets.items()}
    runs = {key: _run(entry, results[key]) for key, entry in entries.items()}
    return study_files.write(Study(folder, profile, names, runs))


def join(folder: Path, parts: Sequence[Path], targets: Sequence[str]) -> int:
    """Write one study of several, such as seeds 0 to 4 of one machine and 5 to 8 of another; return its size in bytes.

    Args:
        folder: Where to; it may be one of the parts, which is then replaced.
        parts: Folders of studies of one profile and the same data sets.
        targets: Targets to keep.

    Raises:
        ConfigError: The parts do not go together, see `read`, or the folder holds something else.
        DataError: There is no study, or no part has one of the targets.
        StorageError: A file is damaged.
    """
    study = study_parts.read_parts(parts)
    of_targets = {name: _results_of_target(study, name) for name in targets}
    names: dict[str, set[str]] = {}
    for key, results in (pair for of_target in of_targets.values() for pair in of_target.items()):
        names.setdefault(key, set()).update(results)
    runs = {
        key: {**study.runs[key], "results": {name: study.runs[key]["results"][name] for name in sorted(results)}}
        for key, results in names.items()
    }
    return study_files.write(replace(study, folder=folder, targets=of_targets, runs=runs))


def data_names(entries: Sequence[Entry]) -> list[str]:
    """Return the names of the data sets of runs."""
    return sorted({study_files.data_name(entry.config) for entry in entries})


def profile_of(folder: Path) -> str:
    """Return the profile of a study.

    Raises:
        DataError: There is no study.
        StorageError: It is damaged.
    """
    return str(study_files.read_index(folder)["profile"])


def read(folder: Path | Sequence[Path], target: str) -> list[Entry]:
    """Return the runs of a target with their labels, as `vitscope.reports.run_index.collect` gives those of run folders.

    Args:
        folder: A study, or several that are parts of one: they have one profile and the same data sets. A run that two parts
            hold counts once, with the results of both.
        target: Target that at least one part has.

    Raises:
        ConfigError: The parts do not go together: profiles or data sets differ, a run has other numbers in another part, or
            two parts have different runs of one experiment with one seed.
        DataError: There is no study, or it does not have the target.
        StorageError: A file is damaged.
    """
    study = study_parts.read_parts([folder] if isinstance(folder, Path) else folder)
    results = _results_of_target(study, target)
    return run_index.labeled([_entry(study, key, set(names)) for key, names in results.items()])


def _results_of_target(study: Study, target: str) -> dict[str, list[str]]:
    if target not in study.targets:
        fix = f"choose one of {', '.join(study.targets)}"
        raise DataError("from", study.folder, f"the study does not hold {target}", fix)
    return {key: sorted(names) for key, names in study.targets[target].items()}


def differing_numbers(first: Path, second: Path, relative: float = 0.0) -> list[str]:
    """Return the numbers in which two studies differ, a line each; runs are paired by experiment and seed.

    Args:
        first: Folder of a study.
        second: Folder of another one.
        relative: Relative difference up to which two numbers are equal; 0 for runs that were repeated on one machine.
    """
    one, other = (dict(_numbers(folder)) for folder in (first, second))
    lines = [f"{key}: only in {first if key in one else second}" for key in sorted(one.keys() ^ other.keys())]
    for key in sorted(one.keys() & other.keys()):
        a, b = one[key], other[key]
        if a != b and (a is None or b is None or not math.isclose(a, b, rel_tol=relative)):
            lines.append(f"{key}: {a} and {b}")
    return lines


def _numbers(folder: Path) -> Iterator[tuple[str, float | None]]:
    for target in study_files.read_index(folder)["targets"]:
        for entry in read(folder, target):
            run = f"{entry.group} seed {entry.seed}"
            yield from ((f"{run} {name}", value) for name, value in entry.metrics.items())
            for m in entry.results:
                yield from ((f"{run} {_name(m)} {name}", value) for name, value in m.scalars.items())


def _key(entry: Entry) -> str:
    """Return the name of a run's file."""
    return entry.id.replace("/", "-")


def _name(measured: Measured) -> str:
    return f"{measured.analysis}/{measured.path.stem}"


def _run(entry: Entry, results: Mapping[str, Measured]) -> dict[str, Any]:
    """Return what is kept of a run: nothing of it names a place on this machine."""
    config = {
        key: value for key, value in entry.config.items() if key not in ("paths", "hydra", "logger", "run_dir", "caps")
    }
    config["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    return {
        "config": config,
        "facts": _facts(entry),
        "metrics": dict(entry.metrics),
        "checkpoints": _checkpoint_hashes(entry.run),
        "results": {name: _result(measured) for name, measured in sorted(results.items())},
    }


def _facts(entry: Entry) -> dict[str, Any]:
    """Return the exported entries of a run's provenance; the file that it started from by its name and folder alone."""
    facts = {key: entry.facts[key] for key in FACTS if key in entry.facts}
    if isinstance(start := facts.get("started_from"), Mapping):
        facts["started_from"] = {**start, "checkpoint": experiment_identity.start_file(start)}
    return facts


def _result(measured: Measured) -> dict[str, Any]:
    content = {
        "measure": measured.measure,
        "tag": measured.tag,
        "time": measured.time,
        "scalars": dict(measured.scalars),
        "card": None if measured.card is None else asdict(measured.card),
        "error": measured.error,
        "texts": dict(measured.texts),
    }
    if measured.path.is_file():
        content["sha256"] = hashlib.sha256(measured.path.read_bytes()).hexdigest()
        if (name := TEXTS.get(measured.measure)) is not None:
            content["texts"] = {name: str(getattr(measured.load(), name))}
    return content


def _checkpoint_hashes(run: Run) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint by its name, {} where the run has no manifest."""
    from vitscope.runs.checkpoints import checkpoint_manifest

    return {name: str(entry.get("sha256", "")) for name, entry in checkpoint_manifest.entries(run.checkpoints).items()}


def _entry(study: Study, key: str, names: set[str]) -> Entry:
    content = study.runs[key]
    group, _ = study_parts.experiment_of(study, key, content)
    try:
        results = [_measured(study.folder / key, name, content["results"][name]) for name in sorted(names)]
        return Entry(
            Run(study.folder / key), content["config"], content["facts"], content["metrics"], {},
            tuple(sorted(results, key=lambda m: m.time)), group,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise study_parts.not_a_run(study, key, error) from None


def _measured(folder: Path, name: str, content: Mapping[str, Any]) -> Measured:
    analysis, _, stem = name.partition("/")
    card = content["card"]
    return Measured(
        analysis=analysis,
        tag=content["tag"],
        measure=content["measure"],
        path=folder / "results" / analysis / f"{stem}.npz",
        scalars=content["scalars"],
        card=None if card is None else ObjectiveCard(**{k: v for k, v in card.items() if k in _CARD_KEYS}),
        error=content["error"],
        time=content["time"],
        texts=content["texts"],
    )
