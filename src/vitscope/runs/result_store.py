"""Results on disk: one ``.npz`` a result that holds everything, and a readable ``.json`` beside it.

The ``.npz`` alone is what is read back: it is replaced atomically, so a crash leaves the old result or the new one, never
a mixture. The ``.json`` mirrors its scalars and its objective card for people and scripts.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.core.probe import ObjectiveCard
from vitscope.runtime import safe_files
from vitscope.runtime.errors import StorageError

_META = "__meta__"


def save(folder: Path, stem: str, result: Any) -> Path:
    """Write a measure's result as ``<stem>.npz`` and ``<stem>.json`` in ``folder``; return the ``.npz``.

    Raises:
        StorageError: the disk is full or not writable; an earlier result of that name is left as it was.
    """
    arrays: dict[str, np.ndarray] = {}
    values = {f.name: _encode(getattr(result, f.name), f.name, arrays) for f in dataclasses.fields(result)}
    kind = type(result)
    meta = {"type": f"{kind.__module__}:{kind.__qualname__}", "fields": values}
    buffer = io.BytesIO()
    arrays[_META] = np.array(json.dumps(meta))
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    target = folder / f"{stem}.npz"
    write_atomically(target, buffer.getvalue())
    save_readable_copy(folder, stem, result)
    return target


def save_readable_copy(folder: Path, stem: str, result: Any) -> None:
    """Write the ``.json`` beside a result's ``.npz``: its scalars and its objective card.

    Raises:
        StorageError: the disk is full or not writable.
    """
    write_atomically(folder / f"{stem}.json", _readable(stem, result))


def has_readable_copy(folder: Path, stem: str, result: Any) -> bool:
    """Tell whether the ``.json`` beside a result's ``.npz`` is there and holds the result's numbers."""
    try:
        stored = json.loads((folder / f"{stem}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and stored.get("scalars") == json.loads(_readable(stem, result))["scalars"]


def _readable(stem: str, result: Any) -> bytes:
    card = getattr(result, "card", None)
    readable = {
        "measure": type(result).__module__.rpartition(".")[2],
        "scalars": result.scalars(),
        "card": card.to_dict() if card else None,
        "arrays": f"{stem}.npz",
    }
    return json.dumps(finite(readable), indent=2, default=str).encode()


def load(path: Path) -> Any:
    """Return the result that `save` wrote to ``path`` (the ``.npz``).

    Raises:
        StorageError: the file is damaged, or is not a result of this package.
    """
    try:
        with os.fdopen(safe_files.open_to_read(path), "rb") as file, np.load(file, allow_pickle=False) as archive:
            meta = json.loads(str(archive[_META]))
            arrays = {name: archive[name] for name in archive.files if name != _META}
        module, _, name = meta["type"].partition(":")
        if not module.startswith("vitscope.diagnostics."):
            raise ValueError(f"its type {meta['type']!r} is not a vitscope measure's")
        kind = getattr(importlib.import_module(module), name)
        known = {f.name for f in dataclasses.fields(kind)}
        return kind(**{key: _decode(value, arrays) for key, value in meta["fields"].items() if key in known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, ImportError) as error:
        raise StorageError(
            "results", path, f"not readable as a result ({error})", "delete it and measure again"
        ) from None
    except Exception as error:  # zipfile and zlib raise their own kinds for damaged archives
        raise StorageError("results", path, f"damaged ({error})", "delete it and measure again") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, and a crash leaves either.

    Raises:
        StorageError: with what the system said.
    """
    temporary = temporary_path(path)
    try:
        safe_files.refuse_links(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that waits under that name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)
        raise StorageError(
            "paths.runs", path, f"not writable ({error.strerror})", "free space or choose another folder"
        ) from None


def temporary_path(path: Path) -> Path:
    """Return where this process writes what it will rename to ``path``: its host and process are in the name."""
    return path.with_name(f".{path.name}.tmp-{host_identity()}-{os.getpid()}")


@functools.cache
def host_identity() -> str:
    """Return 8 digits that name this machine since it was started, and the space in which its process ids hold."""
    facts = [socket.gethostname()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):  # no Linux: the name has to do
            facts.append(read())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def sweep(folder: Path) -> None:
    """Delete the temporary files that dead processes of this machine left in ``folder``; other machines' are left alone."""
    safe_files.refuse_links(folder)
    for file in folder.glob(".*.tmp-*"):
        *host, owner = file.name.rpartition(".tmp-")[2].split("-")
        if owner.isdigit() and host in ([], [host_identity()]) and not is_alive(int(owner)):
            with contextlib.suppress(OSError):  # a folder, or no longer ours
                file.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Tell whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def finite(value: Any) -> Any:
    """Return ``value`` with every number that is not finite replaced by None, as strict JSON wants."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, ObjectiveCard):
        return {"card": finite(value.to_dict())}
    if isinstance(value, tuple | list):
        return {"tuple": [_encode(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, f"{path}.{key}", arrays) for key, item in value.items()}}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"Expected arrays, tuples, dicts, text and numbers in a result, received {type(value).__name__} at {path}."
    )


def _decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "card":
        return ObjectiveCard(**content)
    if kind == "tuple":
        return tuple(_decode(item, arrays) for item in content)
    return {key: _decode(item, arrays) for key, item in content.items()}


class PartialRows(MutableMapping[str, Mapping[str, Any]]):
    """The finished rows of an unfinished measure, one line of a file each, flushed as they are set.

    Each process appends to its own file and reads all of them when it opens, so a measure that was killed goes on with what
    any rank had done. A last line cut short by a kill is left out.

    Args:
        folder: made when the first row is set.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        safe_files.refuse_links(folder)
        self._folder = folder
        self._file = folder / f"rank-{rank}.jsonl"
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._torn: bool | None = None  # whether the file's last line was cut short; None until it is written to
        for file in sorted(folder.glob("rank-*.jsonl")):
            self._rows.update(_read_rows(file))

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
    for line in safe_files.read_text(file).splitlines():
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
