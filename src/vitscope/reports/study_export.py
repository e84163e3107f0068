"""A study as small JSON files for a repository: configurations, metrics, scalars, cards and hashes, no weights and no arrays.

Layout: ``study.json`` (profile, data, what each target reads) and ``runs/<id>.json``, one a run. The tables and figures of
numbers that were drawn from the runs are drawn from it again: ``vitscope reproduce table-claims from=results/cifar10_small``.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity, loading
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports import run_index
from vitscope.reports.measured_results import Measured
from vitscope.reports.run_entry import Entry
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write, redaction
from vitscope.runtime.errors import ConfigError, DataError, StorageError

INDEX = "study.json"
#: version of the layout
FORMAT = 1
#: entries of ``provenance.json`` that are exported: what reports read, and what produced the numbers
FACTS = (
    "status", "command", "created", "seed", "config_hash", "git_commit", "model", "wall_s", "versions",
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
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise ConfigError(
            "export", folder, f"no study ({INDEX} is not in it), so it is not replaced", "name a new folder"
        )
    entries: dict[str, Entry] = {}
    results: dict[str, dict[str, Measured]] = {}
    for entry in (entry for of_target in targets.values() for entry in of_target):
        entries.setdefault(entry.id, entry)
        results.setdefault(entry.id, {}).update({_name(m): m for m in entry.results})
    index = {
        "format": FORMAT,
        "profile": profile,
        "data": data_names(list(entries.values())),
        "hours": round(sum(float(e.facts.get("wall_s") or 0.0) for e in entries.values()) / 3600, 2),
        "targets": {
            name: {e.id: sorted(map(_name, e.results)) for e in of_target} for name, of_target in targets.items()
        },
    }
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "runs").mkdir(parents=True)
    size = 0
    for name, content in [
        (INDEX, index),
        *((f"runs/{key}.json", _run(entry, results[key])) for key, entry in sorted(entries.items())),
    ]:
        text = json.dumps(redaction.redacted(content), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
        atomic_write.write_atomically(folder / name, text)
        size += len(text)
    return size


def data_names(entries: Sequence[Entry]) -> list[str]:
    """Return the names of the data sets of runs."""
    return sorted({str((entry.config.get("data") or {}).get("name", "?")) for entry in entries})


def profile_of(folder: Path) -> str:
    """Return the profile of a study.

    Raises:
        DataError: There is no study.
        StorageError: It is damaged.
    """
    return str(_index(folder)["profile"])


def read(folder: Path, target: str) -> list[Entry]:
    """Return the runs of a target with their labels, as `vitscope.reports.run_index.collect` gives those of run folders.

    Raises:
        DataError: There is no study, or it does not have the target.
        StorageError: A file is damaged.
    """
    targets = _index(folder)["targets"]
    if target not in targets:
        raise DataError("from", folder, f"the study does not hold {target}", f"choose one of {', '.join(targets)}")
    entries = [_entry(folder, key, set(names)) for key, names in targets[target].items()]
    return run_index.labeled(entries)


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
    for target in _index(folder)["targets"]:
        for entry in read(folder, target):
            run = f"{entry.group} seed {entry.seed}"
            yield from ((f"{run} {name}", value) for name, value in entry.metrics.items())
            for m in entry.results:
                yield from ((f"{run} {_name(m)} {name}", value) for name, value in m.scalars.items())


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
        "facts": {key: entry.facts[key] for key in FACTS if key in entry.facts},
        "metrics": dict(entry.metrics),
        "checkpoints": _checkpoint_hashes(entry.run),
        "results": {name: _result(measured) for name, measured in sorted(results.items())},
    }


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


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise DataError(
            "from", folder, f"no study there ({INDEX} is missing)", "name a folder that export= has written"
        )
    index = _json(path)
    if index.get("format") != FORMAT or not isinstance(index.get("targets"), Mapping):
        raise StorageError("from", path, f"not a study of format {FORMAT}", "export it again")
    return index


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(
            "from", path, f"cannot be read ({type(error).__name__})", "restore it or export again"
        ) from None
    if not isinstance(content, dict):
        raise StorageError("from", path, "holds no mapping", "restore it or export again")
    return content


def _entry(folder: Path, key: str, names: set[str]) -> Entry:
    path = folder / "runs" / f"{key}.json"
    content = _json(path)
    try:
        config, facts = content["config"], content["facts"]
        results = [_measured(folder / key, name, content["results"][name]) for name in sorted(names)]
        experiment = {
            **experiment_identity.identity(config),
            "weights": config.get("ckpt_path") if facts.get("command") == "analyze" else None,
        }
        return Entry(
            Run(folder / key), config, facts, content["metrics"], {}, tuple(sorted(results, key=lambda m: m.time)),
            loading.digest(experiment),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"is no run of a study ({type(error).__name__}: {error})"
        raise StorageError("from", path, reason, "restore it or export again") from None


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
