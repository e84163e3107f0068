"""Manifest of a folder of checkpoints: size, hash, epoch and step of each file, and the renames that are not done yet.

The manifest ends with the SHA-256 of its own text. One that differs in one bit is an error and never an empty one: no file is
overwritten because of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import write_atomically
from vitscope.runtime.errors import CheckpointError

MANIFEST = "manifest.json"
#: keys of the manifest that are no file's name: the digest of its own text, and files whose renames are not done
_DIGEST, _PENDING = "manifest_sha256", "pending"


@dataclass
class Manifest:
    """Content of ``manifest.json``: entries by file name, entries whose renames are not done, whether a digest holds them."""

    entries: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    has_digest: bool = True


def entries(folder: Path) -> dict[str, Any]:
    """Return the manifest's entries by file name; empty where there is none.

    Raises:
        CheckpointError: It is not what was written.
    """
    stored = stored_manifest(folder)
    renamed = {name: e for name, e in stored.pending.items() if not (folder / e["temporary"]).exists()}
    return {**stored.entries, **renamed}


def stored_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a folder; empty where there is none.

    Raises:
        CheckpointError: It cannot be read, is of another form, or is not what was written.
    """
    path = folder / MANIFEST
    try:
        with os.fdopen(safe_files.open_to_read(path), "rb") as file:
            raw = file.read(safe_files.LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return Manifest()
    except OSError as error:
        raise _untrusted(path, f"not readable: {error.strerror}") from None
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        raise _untrusted(path, "no JSON") from None
    if not isinstance(tree, dict):
        raise _untrusted(path, f"it holds a {type(tree).__name__}")
    has_digest = _DIGEST in tree
    pending = tree.pop(_PENDING, {})
    tree.pop(_DIGEST, None)
    wrong = [name for name, entry in tree.items() if not _is_entry(name, entry)]
    if isinstance(pending, dict):
        wrong += [name for name, entry in pending.items() if not (_is_entry(name, entry) and _is_temporary(entry))]
    if wrong or not isinstance(pending, dict):
        raise _untrusted(path, f"{(wrong or [_PENDING])[0]!r:.80} is no entry of a checkpoint")
    if has_digest and raw != _manifest_text(tree, pending):
        raise _untrusted(path, "it is not what was written")
    return Manifest(tree, pending, has_digest)


def _untrusted(path: Path, reason: str) -> CheckpointError:
    fix = "restore it from a copy, or move a checkpoint to another folder and name it with ckpt_path=<file>"
    return CheckpointError("ckpt_path", path.parent, f"{MANIFEST} cannot be trusted ({reason})", fix)


def is_content_of(path: Path, entry: Mapping[str, Any]) -> bool:
    """Tell whether a file exists and has the size and the hash of an entry."""
    try:
        return path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    except OSError:
        return False


def _is_entry(name: Any, entry: Any) -> bool:
    kinds = {"sha256": str, "bytes": int, "epoch": int, "global_step": int}
    typed = isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())
    return name == Path(name).name and typed and min(entry["bytes"], entry["epoch"], entry["global_step"]) >= 0


def _is_temporary(entry: Mapping[str, Any]) -> bool:
    name = entry.get("temporary")
    return isinstance(name, str) and name == Path(name).name and name.startswith(".")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, entries: Mapping[str, Any], pending: Mapping[str, Any] | None = None) -> None:
    """Replace ``manifest.json`` atomically by one with these entries, by file name, and the digest of its own text."""
    write_atomically(folder / MANIFEST, _manifest_text(entries, pending or {}))


def _manifest_text(entries: Mapping[str, Any], pending: Mapping[str, Any]) -> bytes:
    tree = {**entries, _PENDING: pending} if pending else dict(entries)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return json.dumps({**tree, _DIGEST: digest}, indent=1, sort_keys=True).encode()
