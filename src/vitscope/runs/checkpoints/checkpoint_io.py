"""Write, verify and read checkpoints: one commit point for all files of an event, hashes of what they hold, no pickled code.

All files of one event (``last``, ``best`` and an epoch's own) are written beside their targets and flushed to the disk. Then
``manifest.json`` is replaced by one that lists them as pending: from there on the event holds, and `repair` finishes the
renames that a kill prevented. Each checkpoint holds the SHA-256 of its content. Reading never executes code, whatever the
environment says.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from vitscope.runs.checkpoints import checkpoint_manifest, file_formats
from vitscope.runs.checkpoints.checkpoint_content import CONTENT_DIGEST, check_plain, content_digest
from vitscope.runs.checkpoints.checkpoint_manifest import (
    MANIFEST,
    is_content_of,
    sha256,
    stored_manifest,
    write_manifest,
)
from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import sweep, temporary_path
from vitscope.runtime.errors import CheckpointError, StorageError

_FORCED = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to write and read checkpoints, replaced by `write` and `read`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; ``storage_options={"copies": names}`` adds files of the same content to the same event."""
        path = Path(path)
        write(checkpoint, path, copies=(storage_options or {}).get("copies", ()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a verified file on the CPU, never executing anything."""
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file and its line in the manifest."""
        path = Path(path)
        safe_files.refuse_links(path.parent)
        path.unlink(missing_ok=True)
        stored = stored_manifest(path.parent)
        if stored.entries.pop(path.name, None) is not None:
            write_manifest(path.parent, stored.entries)


def write(checkpoint: Mapping[str, Any], path: Path, *, copies: Sequence[str] = ()) -> None:
    """Write a checkpoint of plain containers and tensors to ``path`` and its hash to the manifest.

    Args:
        checkpoint: Contents to save.
        path: The file.
        copies: Names of further files of the same folder with the same content. A kill leaves all of them old or all of them
            new: all are on the disk under temporary names before the manifest lists them as pending, which is the commit
            point, and a kill between the renames that follow is repaired by `repair`.

    Raises:
        CheckpointError: It holds something that could not be read back safely, named by its place; the manifest is damaged.
        StorageError: The disk is full or read-only; earlier files of these names are left as they were.
    """
    folder, names = path.parent, [path.name, *copies]
    check_plain(checkpoint, "checkpoint")
    content = {**checkpoint, CONTENT_DIGEST: content_digest(checkpoint)}
    temporaries = {name: temporary_path(folder / name) for name in names}
    try:
        safe_files.refuse_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        repair(folder)
        first = temporaries[names[0]]
        first.unlink(missing_ok=True)
        with first.open("xb") as file:  # never through a link that waits under that name
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        for name in names[1:]:
            _copy(first, temporaries[name])
        entry = {
            "sha256": sha256(first),
            "bytes": first.stat().st_size,
            "epoch": int(checkpoint.get("epoch", 0)),
            "global_step": int(checkpoint.get("global_step", 0)),
        }
        pending = {name: {**entry, "temporary": temporaries[name].name} for name in names}
        entries = stored_manifest(folder).entries
        write_manifest(folder, entries, pending)  # the commit point
        for name in names:
            os.replace(temporaries[name], folder / name)
        _sync_folder(folder)
        write_manifest(folder, {**entries, **dict.fromkeys(names, entry)})
    except StorageError:
        _remove_uncommitted(folder, temporaries.values())
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        _remove_uncommitted(folder, temporaries.values())
        # while torch closes its archive after the system's refusal, it raises one of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise StorageError(
            "paths.runs", folder / names[0], f"checkpoint not written ({reason})", "free space or choose another folder"
        ) from None


def repair(folder: Path) -> None:
    """Finish the renames of an event that was committed and then killed, and delete what dead processes left behind.

    Only the process that writes the folder may call it.

    Raises:
        CheckpointError: The manifest cannot be trusted.
        StorageError: The folder cannot be written.
    """
    safe_files.refuse_links(folder)
    stored = stored_manifest(folder)
    if stored.pending:
        for name, entry in stored.pending.items():
            temporary = folder / entry["temporary"]
            try:
                if is_content_of(temporary, entry):
                    os.replace(temporary, folder / name)
            except OSError as error:
                raise StorageError(
                    "paths.runs",
                    folder / name,
                    f"not writable ({error.strerror})",
                    "free space or choose another folder",
                ) from None
            if is_content_of(folder / name, entry):
                stored.entries[name] = {key: value for key, value in entry.items() if key != "temporary"}
        write_manifest(folder, stored.entries)
    sweep(folder)


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _remove_uncommitted(folder: Path, temporaries: Any) -> None:
    """Delete temporary files after an error, except those that the manifest already counts on."""
    with contextlib.suppress(OSError, CheckpointError):  # where the folder is none, there is nothing to remove
        committed = {entry["temporary"] for entry in stored_manifest(folder).pending.values()}
        for temporary in temporaries:
            if temporary.name not in committed:
                temporary.unlink(missing_ok=True)


def read(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path`` on the CPU.

    Args:
        path: The file.
        verify: Whether to compare it with the manifest's hash first, where the manifest lists it.

    Raises:
        CheckpointError: Missing, damaged, altered, or holding more than plain containers and tensors.
    """
    safe_files.refuse_links(path)
    if path.is_dir():
        raise CheckpointError(
            "ckpt_path", path, "a folder, not a file", "name a file of weights in it, or use run=<folder>"
        )
    if not path.is_file():
        raise CheckpointError(
            "ckpt_path", path, "no such file", "name a checkpoint file; run=<folder> names a run's own"
        )
    if verify and not verified(path):
        raise CheckpointError(
            "ckpt_path", path, "its hash differs from the one in manifest.json", "use another checkpoint"
        )
    environment_values = {key: os.environ.pop(key) for key in _FORCED if key in os.environ}
    try:
        content = file_formats.load_plain(path)
    finally:
        os.environ.update(environment_values)
    if not isinstance(content, dict):
        raise CheckpointError("ckpt_path", path, f"holds a {type(content).__name__}", "use a dictionary of tensors")
    if CONTENT_DIGEST in content and content.pop(CONTENT_DIGEST) != content_digest(content):
        raise CheckpointError(
            "ckpt_path", path, "its hash differs from the one in manifest.json", "use another checkpoint"
        )
    return content


def newest(folder: Path) -> Path:
    """Return the verified checkpoint of ``folder`` with the most steps, warning of damaged ones passed over.

    A manifest of an earlier version, which holds no digest of itself, has to agree with every file.

    Raises:
        CheckpointError: There is none, the manifest cannot be trusted, or what is left would begin again at step 0.
    """
    stored = stored_manifest(folder)
    entries = checkpoint_manifest.entries(folder)
    fix = "restore it from a copy, or move a checkpoint to another folder and name it with ckpt_path=<file>"
    unlisted = sorted(file.name for file in folder.glob("*.ckpt") if file.name not in entries)
    if unlisted:
        reason = f"{MANIFEST} is missing or does not list {unlisted[0]}, so it cannot be trusted"
        raise CheckpointError("ckpt_path", folder, reason, fix)
    if not stored.has_digest:
        for name in entries:
            if not _agrees_in_full(folder / name, entries[name]):
                reason = f"{MANIFEST} and {name} disagree, and nothing says which is damaged"
                raise CheckpointError("ckpt_path", folder, reason, fix)
    ranked = sorted(entries, key=lambda name: (entries[name]["global_step"], name == "last.ckpt"), reverse=True)
    for name in ranked:
        if verified(folder / name):
            if entries[name]["global_step"] == 0 and entries[ranked[0]]["global_step"] > 0:
                reason = f"{ranked[0]} is damaged or missing, and only {name}, at step 0, is left"
                raise CheckpointError(
                    "ckpt_path", folder, reason, f"use ckpt_path={folder / name} to begin again there"
                )
            return folder / name
        warnings.warn(f"checkpoint {name} is damaged or missing: falling back to an earlier one", stacklevel=2)
    raise CheckpointError("ckpt_path", folder, "no verified checkpoint", "start a new run without ckpt_path")


def _agrees_in_full(path: Path, entry: Mapping[str, Any]) -> bool:
    """Tell whether a file has the hash of its entry and holds the epoch and step that the entry gives."""
    if not is_content_of(path, entry):
        return False
    content = read(path, verify=False)
    return all(content.get(key, 0) == entry[key] for key in ("epoch", "global_step"))


def verified(path: Path) -> bool:
    """Tell whether the manifest beside ``path`` vouches for it; a file from elsewhere, with no manifest, passes.

    Raises:
        CheckpointError: The manifest cannot be trusted.
    """
    for _ in range(3):  # a training may replace the file and the manifest meanwhile
        if not (path.parent / MANIFEST).exists():
            return path.is_file()
        stored = stored_manifest(path.parent)
        vouched = [entries[path.name] for entries in (stored.entries, stored.pending) if path.name in entries]
        if any(is_content_of(path, entry) for entry in vouched):
            return True
        if stored_manifest(path.parent) == stored:
            return False
    return False


def present(folder: Path) -> bool:
    """Tell whether there is anything to go on from in ``folder``, whole or damaged: a manifest or a checkpoint."""
    return (folder / MANIFEST).exists() or any(folder.glob("*.ckpt"))


def is_settled(folder: Path) -> bool:
    """Tell whether no rename of a committed event is left to do."""
    return not stored_manifest(folder).pending


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
