"""Deletion of run folders, or of their checkpoints alone: never of a run that is alive, never through a link."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from vitscope.runs import metrics_log, run_lock
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import ConfigError, StorageError

#: entries of a run folder that vitscope writes; the last two make it a run and are deleted last
ENTRIES = ("checkpoints", "results", "figures", "tables", "wandb", "csv", "tensorboard", "log.txt", "output.txt", "job.json",
           run_lock.FILE, metrics_log.FILE, "provenance.json", "config.yaml")  # fmt: skip


@dataclass(frozen=True)
class Removal:
    """A deletion that has been checked.

    Attributes:
        run: The run.
        paths: Files and folders to delete, in this order.
        size: Their bytes.
        whole: Whether the run folder goes with them.
    """

    run: Run
    paths: tuple[Path, ...]
    size: int
    whole: bool


def plan(run: Run, keep_results: bool) -> Removal:
    """Return what would be deleted of a run, after the checks that forbid it; nothing is changed.

    Args:
        run: The run.
        keep_results: Delete the checkpoints only.

    Raises:
        ConfigError: The folder is a link, no run folder, or holds what vitscope did not write, such as other runs.
        StorageError: A process trains in the folder.
    """
    if run.path.is_symlink():
        raise ConfigError("run", run.path, "a symbolic link", "name the folder that it leads to")
    if not all(_is_regular(run.path / name) for name in ("config.yaml", "provenance.json")):
        raise ConfigError("run", run.path, "not a run folder (config.yaml and provenance.json are not both files in it)",
                          "name a folder of `vitscope runs list`")  # fmt: skip
    holder = run_lock.living_holder(run.path)
    if holder is not None or run_lock.holds(run.path):
        raise StorageError("run", run.path, f"{holder or 'this process'} trains in this folder", "wait until it ends")
    if keep_results:
        if run.checkpoints.is_symlink():
            raise ConfigError("run", run.checkpoints, "a symbolic link inside of a run folder", "delete the link")
        paths = (run.checkpoints,) if run.checkpoints.is_dir() else ()
        return Removal(run, paths, sum(map(_size, paths)), whole=False)
    names = sorted(os.listdir(run.path))
    foreign = [name for name in names if name not in ENTRIES and not _is_temporary(name)]
    if foreign:
        listed = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConfigError("run", run.path, f"holds {listed}, which vitscope did not write", "move it elsewhere first")
    order = sorted(names, key=lambda name: ENTRIES.index(name) if name in ENTRIES else -1)
    paths = tuple(run.path / name for name in order)
    return Removal(run, paths, sum(map(_size, paths)), whole=True)


def perform(removal: Removal) -> None:
    """Delete what `plan` returned while holding the run's lock, so that no training starts in the folder meanwhile.

    The configuration goes last: a deletion that is interrupted leaves a run that can be deleted again.

    Raises:
        StorageError: A training took the folder since the plan was made, or a file cannot be deleted.
    """
    folder = removal.run.path
    run_lock.acquire(folder)
    try:
        for path in removal.paths:
            if path.name != run_lock.FILE:
                _delete(path)
    except OSError as error:
        raise StorageError(
            "run", error.filename or folder, f"not deleted ({error.strerror})", "delete it by hand"
        ) from None
    finally:
        run_lock.release(folder)
    if removal.whole:
        try:
            folder.rmdir()
        except OSError as error:
            raise StorageError("run", folder, f"not deleted ({error.strerror})", "delete it by hand") from None


def _delete(path: Path) -> None:
    """Delete a file, a link itself, or a folder with what it holds; links in it are not followed."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(top, name)).st_size for top, _, names in os.walk(path) for name in names)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_temporary(name: str) -> bool:
    """Tell whether a name is that of a file that a kill left, see `atomic_write`."""
    return name.startswith(".") and ".tmp-" in name
