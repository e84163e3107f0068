"""Index of a folder of runs: what reports read of each run, kept in one file and taken again while the run's files are unchanged.

The file ``.vitscope-index.jsonl`` lies in the folder of runs. Its first line names the version of the code that wrote it; every
other line is a run: its folder, the sizes, times and inode numbers of the files that its entry was read from, the entry, and a
checksum. A line is used where the files of the run are still those; a run that is new, changed, damaged or still written to is
read from its files. So a list or a report is the same with the index, without it, and with one that is damaged or of another
version. The file is replaced as a whole: of two processes that write it, one wins, and the other's runs are read again next time.
It may be deleted at any time.

A file that changes twice within the resolution of the file system's clock, with one size, would not be told from its first
version: runs whose files are younger than `SETTLED_NS` by that clock are therefore not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity, loading
from vitscope.core import objective_card
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports import measured_results, run_entry, run_files
from vitscope.reports.measured_results import Measured
from vitscope.reports.run_entry import Entry
from vitscope.runs import metrics_log
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write, safe_files
from vitscope.runtime.errors import StorageError

FILE = ".vitscope-index.jsonl"
#: a run is kept once its files are this much older than the moment at which they were read, in nanoseconds
SETTLED_NS = 2 * 10**9
#: modules that an entry follows from: an index of another version of them is not used
_SOURCES = (run_files, run_entry, measured_results, objective_card, experiment_identity, loading, metrics_log)
_CARD_FIELDS = tuple(f.name for f in fields(ObjectiveCard))

#: name, time of the last change of content and of attributes in nanoseconds, size and inode number of each file of a run
Signature = list[list[Any]]


class EntryIndex:
    """The index of a folder of runs.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rows = _read(root / FILE)
        self._is_changed = False
        self._started_ns: int | None = None

    def entry(self, run: Run, signature: Signature) -> Entry | None:
        """Return the entry of a run whose files are those that it was read from; None where it must be read."""
        row = self._rows.get(self._key(run))
        if row is None or row.get("files") != signature:
            return None
        try:
            return _restored(run, row["entry"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def begin(self) -> None:
        """Note the time of the file system before a run is read, so that files which change meanwhile are told from others."""
        if self._started_ns is None:
            self._started_ns = _file_system_time_ns(self._root)

    def add(self, run: Run, signature: Signature, entry: Entry) -> None:
        """Keep a run's entry, if its files are settled and it comes back from its text as it is.

        Args:
            run: The run.
            signature: Signature of the run's files before they were read.
            entry: What was read after `begin`.
        """
        settled = self._started_ns is not None and all(
            max(content_ns, attributes_ns) < self._started_ns - SETTLED_NS
            for _, content_ns, attributes_ns, *_ in signature
        )
        if not settled:
            return
        try:
            content = json.loads(json.dumps(_stored(entry)))
            if _restored(run, content) != entry:  # numbers that are not finite, keys that are no text
                return
        except (TypeError, ValueError, RecursionError):
            return
        self._rows[self._key(run)] = {"files": signature, "entry": content}
        self._is_changed = True

    def save(self) -> None:
        """Write the index where runs were added; without a place to write nothing happens. Runs that are gone are left out."""
        if not self._is_changed:
            return
        lines = [_header()]
        for key, row in self._rows.items():
            if (self._root / key / "config.yaml").exists():
                text = json.dumps({"run": key, **row}, separators=(",", ":"))
                lines.append(f"{_checksum(text)} {text}")
        with contextlib.suppress(StorageError):
            atomic_write.write_atomically(self._root / FILE, ("\n".join(lines) + "\n").encode())
            self._is_changed = False

    def _key(self, run: Run) -> str:
        return os.path.relpath(run.path, self._root)


def signature(run: Run) -> Signature | None:
    """Return what tells whether the files that an entry is read from have changed; None for a folder with links among them."""
    files: Signature = []
    try:
        for path in (run.path / "config.yaml", run.path / "provenance.json"):
            files.append(_facts(path.name, path.lstat()))
        with contextlib.suppress(FileNotFoundError):
            files.append(_facts(run.journal.name, run.journal.lstat()))
        for folder in _folders(run.results):
            for item in list(os.scandir(folder)):
                if item.name.endswith(".json"):
                    files.append(_facts(f"{folder.name}/{item.name}", item.stat(follow_symlinks=False)))
    except (OSError, ValueError):
        return None
    return sorted(files)


def _folders(results: Path) -> list[Path]:
    """Return the folders of results.

    Raises:
        ValueError: A link, or a file where a folder is expected.
    """
    try:
        mode = results.lstat().st_mode
    except FileNotFoundError:
        return []
    if not stat.S_ISDIR(mode):
        raise ValueError(f"Expected a folder, received {results}.")
    folders = []
    for item in list(os.scandir(results)):
        if item.is_symlink():
            raise ValueError(f"Expected no link, received {item.path}.")
        if item.is_dir(follow_symlinks=False):
            folders.append(Path(item.path))
    return folders


def _facts(name: str, status: os.stat_result) -> list[Any]:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"Expected a regular file, received {name}.")
    return [name, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]


def _stored(entry: Entry) -> dict[str, Any]:
    """Return an entry as plain values."""
    return {
        "config": entry.config,
        "facts": entry.facts,
        "metrics": entry.metrics,
        "curves": {key: list(curve) for key, curve in entry.curves.items()},
        "group": entry.group,
        "results": [
            {
                "analysis": m.analysis,
                "tag": m.tag,
                "measure": m.measure,
                "file": m.path.name,
                "scalars": m.scalars,
                "card": None if m.card is None else {name: getattr(m.card, name) for name in _CARD_FIELDS},
                "error": m.error,
                "time": m.time,
            }
            for m in entry.results
        ],
    }


def _restored(run: Run, content: Mapping[str, Any]) -> Entry:
    """Return the entry of `_stored`."""
    results = tuple(
        Measured(
            analysis=m["analysis"],
            tag=m["tag"],
            measure=m["measure"],
            path=run.results / m["analysis"] / m["file"],
            scalars=m["scalars"],
            card=None if m["card"] is None else ObjectiveCard(**m["card"]),
            error=m["error"],
            time=m["time"],
        )
        for m in content["results"]
    )
    curves = {key: (xs, ys) for key, (xs, ys) in content["curves"].items()}
    return Entry(run, content["config"], content["facts"], content["metrics"], curves, results, content["group"])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of an index by run; none of a file that is missing, of another version or damaged in its first line."""
    try:
        header, *lines = safe_files.read_text(path, safe_files.LARGEST_METRICS).splitlines() or [""]
    except (OSError, StorageError):
        return {}
    if header != _header():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        checksum, _, text = line.partition(" ")
        if checksum != _checksum(text):  # cut short, or changed by hand
            continue
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            row = json.loads(text)
            rows[row.pop("run")] = row
    return rows


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@cache
def _header() -> str:
    """Return the first line of an index of this version of the code."""
    digest = hashlib.blake2b(digest_size=16)
    for source in (__file__, *(module.__file__ for module in _SOURCES)):
        digest.update(Path(str(source)).read_bytes())
    return f"vitscope index {digest.hexdigest()}"


def _file_system_time_ns(folder: Path) -> int | None:
    """Return the time by which the folder's file system dates files; None where nothing can be written."""
    probe = atomic_write.temporary_path(folder / FILE)
    try:
        probe.unlink(missing_ok=True)
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
