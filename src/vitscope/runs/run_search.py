"""The search among run folders: all below a folder, and the runs of one configuration that are finished or can be resumed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from vitscope.config import experiment_identity, loading
from vitscope.runs import metrics_log
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import StorageError, VitscopeError


def every(root: Path) -> list[Run]:
    """Return the runs below ``root``, oldest first by name."""
    return [
        Run(file.parent) for file in _files(root, "config.yaml") if os.path.lexists(file.parent / "provenance.json")
    ]


def incomplete(root: Path) -> list[tuple[Path, str]]:
    """Return folders below ``root`` that hold a run's metrics or provenance, and which file of a run they lack."""
    folders = {file.parent for name in ("provenance.json", metrics_log.FILE) for file in _files(root, name)}
    lacking = [path for path in sorted(folders) if not (path / "config.yaml").exists()]
    unrecorded = sorted(folders - set(lacking))
    return [(path, "config.yaml") for path in lacking] + [
        (path, "provenance.json") for path in unrecorded if not os.path.lexists(path / "provenance.json")
    ]


def _files(root: Path, name: str) -> list[Path]:
    """Return the files of a name below ``root``, sorted; links to nothing, which Python lists from 3.13 on, are left out."""
    return sorted(file for file in root.glob(f"**/{name}") if os.path.exists(file))


def unfinished(root: Path, config_hash: str) -> Run | None:
    """Return the newest run below ``root`` of that configuration that has a checkpoint and is not finished.

    A run that started from another file's weights is another experiment than a training with the same configuration.
    """
    from vitscope.runs.checkpoints import checkpoint_io

    for run in _alike(root, config_hash):
        facts = run.provenance()
        is_unfinished = facts.get("status") != "finished" and "started_from" not in facts
        if is_unfinished and checkpoint_io.present(run.checkpoints):
            return run
    return None


def finished(root: Path, config_hash: str) -> Run | None:
    """Return the newest finished run below ``root`` of that configuration, trained from initial weights at one length."""
    return next((run for run in _alike(root, config_hash) if is_finished_training(run)), None)


def is_finished_training(run: Run) -> bool:
    """Tell whether a run is finished, began with initial weights and had one length, as its configuration alone says."""
    facts = run.provenance()
    if facts.get("status") != "finished":
        return False
    if "started_from" not in facts and not facts.get("changes"):
        return True
    try:
        return experiment_identity.is_from_initial_weights(loading.plain(run.config()), facts)
    except VitscopeError:  # a damaged folder beside ours
        return False


def _alike(root: Path, config_hash: str) -> Iterator[Run]:
    """Yield the runs of that configuration, newest first."""
    return reversed(oldest_first(run for run in every(root) if _recorded_hash(run) == config_hash))


def oldest_first(runs: Iterable[Run]) -> list[Run]:
    """Return runs in the order in which they were made; names, such as those of jobs and of trials, do not tell it."""
    return sorted(runs, key=lambda run: (_created(run), run.id))


def _created(run: Run) -> float:
    try:
        return datetime.fromisoformat(str(run.provenance().get("created"))).timestamp()
    except (StorageError, ValueError):
        return 0.0


def _recorded_hash(run: Run) -> str | None:
    try:
        return run.provenance().get("config_hash")
    except StorageError:  # a damaged folder beside ours is no run to go on with
        return None
