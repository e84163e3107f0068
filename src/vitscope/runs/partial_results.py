"""Rows of an unfinished measurement on disk, so that an interrupted analysis resumes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.runtime import safe_files
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.errors import StorageError


class PartialRows(MutableMapping[str, Mapping[str, Any]]):
    """The finished rows of an unfinished measure, one line of a file each, flushed as they are set.

    Each process appends to its own file and reads all of them when it opens, so a measure that was killed goes on with what
    any rank had done. A last line cut short by a kill is left out.

    Args:
        folder: Folder of the rows, made when the first one is set.
        rank: Rank of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        safe_files.refuse_links(folder)
        self._folder = folder
        self._file = folder / f"rank-{rank}.jsonl"
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._torn: bool | None = None  # whether the file's last line was cut short; None until it is written to
        for file in sorted(folder.glob("rank-*.jsonl")):
            self._rows.update(_read_rows(file))

    def share(self) -> None:
        """Give every rank the rows that any rank has read, as a row may be the work of all ranks together."""
        names = gather_objects(sorted(self._rows))
        if names != names[:1] * len(names):  # a file system may show files to some machines later
            self._rows = {key: row for rows in gather_objects(self._rows) for key, row in rows.items()}

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        """Return the row of that key."""
        return self._rows[key]

    def __setitem__(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep the row and write it down at once."""
        self._rows[key] = row
        line = json.dumps({"key": key, "row": {name: _pack(value) for name, value in row.items()}}) + "\n"
        try:
            self._append(line)
        except OSError as error:
            raise StorageError("paths.runs", self._file, f"not writable ({error.strerror})", "free space") from None

    def _append(self, line: str) -> None:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                if self._torn is None:
                    self._torn = self._file.is_file() and not safe_files.read_text(self._file).endswith("\n")
                safe_files.append_text(self._file, ("\n" if self._torn else "") + line)
            except FileNotFoundError:  # another process that measured the same has finished and deleted the folder
                continue
            self._torn = False
            return

    def __delitem__(self, key: str) -> None:
        """Forget a row for this process (its line stays)."""
        del self._rows[key]

    def __iter__(self) -> Iterator[str]:
        """Go through the keys."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def discard(self) -> None:
        """Delete the files: the measure is finished and saved."""
        for file in self._folder.glob("rank-*.jsonl"):
            file.unlink(missing_ok=True)
        if self._folder.is_dir():
            self._folder.rmdir()


def _read_rows(file: Path) -> dict[str, Mapping[str, Any]]:
    rows: dict[str, Mapping[str, Any]] = {}
    try:
        text = safe_files.read_text(file)
    except FileNotFoundError:  # another process that measured the same has just finished and deleted it
        return rows
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            rows[entry["key"]] = {name: _unpack(value) for name, value in entry["row"].items()}
        except Exception:  # cut short by a kill, or damaged: that row is measured again
            continue
    return rows


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return {"npy": base64.b64encode(buffer.getvalue()).decode()}
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"npy"}:
        return np.load(io.BytesIO(base64.b64decode(value["npy"])), allow_pickle=False)
    return value
