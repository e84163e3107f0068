"""Write, verify and read checkpoints: one commit point for all files of an event, hashes of what they hold, no pickled code.

All files of one event (``last``, ``best`` and an epoch's own) are written beside their targets and flushed to the disk. Then
``manifest.json`` is replaced by one that lists them as pending: from there on the event holds, and `repair` finishes the
renames that a kill prevented. The manifest ends with the SHA-256 of its own text, each checkpoint holds the SHA-256 of its
content. A manifest that differs in one bit is an error and never an empty one: nothing is overwritten on its word.
Reading never executes code, whatever the environment says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import sweep, temporary_path, write_atomically
from vitscope.runtime.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
#: keys of the manifest that are no file's name: the digest of its own text, and files whose renames are not done
_DIGEST, _PENDING = "manifest_sha256", "pending"
#: key of a checkpoint that holds the digest of all its other entries
CONTENT_DIGEST = "content_sha256"
_FORCED = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")
#: where checkpoints keep the weights, and what wrappers put before their names
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("model.", "module.", "_orig_mod.")
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.Size, torch.dtype, torch.device)


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
        stored = _stored_manifest(path.parent)
        if stored.entries.pop(path.name, None) is not None:
            _write_manifest(path.parent, stored.entries)


@dataclass
class _Manifest:
    """What ``manifest.json`` says: entries by file name, entries whose renames are not done, whether a digest holds them."""

    entries: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    has_digest: bool = True


def write(checkpoint: Mapping[str, Any], path: Path, *, copies: Sequence[str] = ()) -> None:
    """Write a checkpoint of plain containers and tensors to ``path`` and its hash to the manifest.

    Args:
        checkpoint: what to save.
        path: the file.
        copies: names of further files of the same folder with the same content. A kill leaves all of them old or all of them
            new: all are on the disk under temporary names before the manifest lists them as pending, which is the commit
            point, and a kill between the renames that follow is repaired by `repair`.

    Raises:
        CheckpointError: it holds something that could not be read back safely, named by its place; the manifest is damaged.
        StorageError: the disk is full or read-only; earlier files of these names are left as they were.
    """
    folder, names = path.parent, [path.name, *copies]
    _check_plain(checkpoint, "checkpoint")
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
        entries = _stored_manifest(folder).entries
        _write_manifest(folder, entries, pending)  # the commit point
        for name in names:
            os.replace(temporaries[name], folder / name)
        _sync_folder(folder)
        _write_manifest(folder, {**entries, **dict.fromkeys(names, entry)})
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
        CheckpointError: the manifest cannot be trusted.
        StorageError: the folder cannot be written.
    """
    safe_files.refuse_links(folder)
    stored = _stored_manifest(folder)
    if stored.pending:
        for name, entry in stored.pending.items():
            temporary = folder / entry["temporary"]
            try:
                if _is_content_of(temporary, entry):
                    os.replace(temporary, folder / name)
            except OSError as error:
                raise StorageError(
                    "paths.runs",
                    folder / name,
                    f"not writable ({error.strerror})",
                    "free space or choose another folder",
                ) from None
            if _is_content_of(folder / name, entry):
                stored.entries[name] = {key: value for key, value in entry.items() if key != "temporary"}
        _write_manifest(folder, stored.entries)
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
        committed = {entry["temporary"] for entry in _stored_manifest(folder).pending.values()}
        for temporary in temporaries:
            if temporary.name not in committed:
                temporary.unlink(missing_ok=True)


def read(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path`` on the CPU.

    Args:
        path: the file.
        verify: compare it with the manifest's hash first, where the manifest lists it.

    Raises:
        CheckpointError: missing, damaged, altered, or holding more than plain containers and tensors.
    """
    safe_files.refuse_links(path)
    if not path.is_file():
        raise CheckpointError("ckpt_path", path, "no such file", "name a checkpoint file, or ckpt_path=last")
    if verify and not verified(path):
        raise CheckpointError("ckpt_path", path, "its content is not what was written", "use another checkpoint")
    environment_values = {key: os.environ.pop(key) for key in _FORCED if key in os.environ}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the readers of archives and pickles raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            "ckpt_path", path, f"not a safe checkpoint ({reason[:160]})", "use another checkpoint"
        ) from None
    finally:
        os.environ.update(environment_values)
    if not isinstance(content, dict):
        raise CheckpointError("ckpt_path", path, f"holds a {type(content).__name__}", "use a dictionary of tensors")
    if CONTENT_DIGEST in content and content.pop(CONTENT_DIGEST) != content_digest(content):
        raise CheckpointError("ckpt_path", path, "its content is not what was written", "use another checkpoint")
    return content


def content_digest(content: Any) -> str:
    """Return the SHA-256 of a tree of containers, numbers, text and tensors: types, keys, order, shapes and every bit.

    The entry under `CONTENT_DIGEST` at the top is left out.
    """
    total = hashlib.sha256()
    _add_to_digest(total, {k: v for k, v in content.items() if k != CONTENT_DIGEST})
    return total.hexdigest()


def _add_to_digest(total: Any, value: Any) -> None:
    total.update(f"<{'dict' if isinstance(value, dict) else type(value).__name__}>".encode())
    if isinstance(value, dict):
        total.update(struct.pack("<q", len(value)))
        for key, item in value.items():
            _add_to_digest(total, key)
            _add_to_digest(total, item)
    elif isinstance(value, list | tuple):
        total.update(struct.pack("<q", len(value)))
        for item in value:
            _add_to_digest(total, item)
    elif isinstance(value, torch.Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.layout is torch.strided and not value.is_quantized:
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, float):
        total.update(struct.pack("<d", value))
    else:
        text = repr(sorted(map(repr, value)) if isinstance(value, set) else value)
        total.update(f"{len(text)}:{text}".encode())


def newest(folder: Path) -> Path:
    """Return the verified checkpoint of ``folder`` with the most steps, warning of damaged ones passed over.

    A manifest of an earlier version, which holds no digest of itself, has to agree with every file.

    Raises:
        CheckpointError: there is none, the manifest cannot be trusted, or what is left would begin again at step 0.
    """
    stored = _stored_manifest(folder)
    entries = manifest(folder)
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
    raise CheckpointError("ckpt_path", folder, "no verified checkpoint", "start afresh without ckpt_path")


def _agrees_in_full(path: Path, entry: Mapping[str, Any]) -> bool:
    """Tell whether a file has the hash of its entry and holds the epoch and step that the entry gives."""
    if not _is_content_of(path, entry):
        return False
    content = read(path, verify=False)
    return all(content.get(key, 0) == entry[key] for key in ("epoch", "global_step"))


def verified(path: Path) -> bool:
    """Tell whether the manifest beside ``path`` vouches for it; a file from elsewhere, with no manifest, passes.

    Raises:
        CheckpointError: the manifest cannot be trusted.
    """
    for _ in range(3):  # a training may replace the file and the manifest meanwhile
        if not (path.parent / MANIFEST).exists():
            return path.is_file()
        stored = _stored_manifest(path.parent)
        vouched = [entries[path.name] for entries in (stored.entries, stored.pending) if path.name in entries]
        if any(_is_content_of(path, entry) for entry in vouched):
            return True
        if _stored_manifest(path.parent) == stored:
            return False
    return False


def present(folder: Path) -> bool:
    """Tell whether there is anything to go on from in ``folder``, whole or damaged: a manifest or a checkpoint."""
    return (folder / MANIFEST).exists() or any(folder.glob("*.ckpt"))


def is_settled(folder: Path) -> bool:
    """Tell whether no rename of a committed event is left to do."""
    return not _stored_manifest(folder).pending


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's entries by file name; empty where there is none.

    Raises:
        CheckpointError: it is not what was written.
    """
    stored = _stored_manifest(folder)
    renamed = {name: e for name, e in stored.pending.items() if not (folder / e["temporary"]).exists()}
    return {**stored.entries, **renamed}


def _stored_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        with os.fdopen(safe_files.open_to_read(path), "rb") as file:
            raw = file.read(safe_files.LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return _Manifest()
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
    return _Manifest(tree, pending, has_digest)


def _untrusted(path: Path, reason: str) -> CheckpointError:
    fix = "restore it from a copy, or move a checkpoint to another folder and name it with ckpt_path=<file>"
    return CheckpointError("ckpt_path", path.parent, f"{MANIFEST} cannot be trusted ({reason})", fix)


def _is_content_of(path: Path, entry: Mapping[str, Any]) -> bool:
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


def model_state(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the network's own weights of a vitscope, Lightning or plain checkpoint, prefixes removed."""
    state = _tensors(content)
    for prefix in _PREFIXES:
        state = _without(prefix, state)
    return state


def unwrapped(content: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return a checkpoint's tensors by name as they are, then without one, two, ... prefixes of wrappers that all names share."""
    readings = [_tensors(content)]
    while prefix := next((p for p in _PREFIXES if readings[-1] and all(n.startswith(p) for n in readings[-1])), None):
        readings.append(_without(prefix, readings[-1]))
    return readings


def _tensors(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
    return {str(name): value for name, value in nested.items() if isinstance(value, torch.Tensor)}


def _without(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shared = bool(state) and all(name.startswith(prefix) for name in state)
    return {name.removeprefix(prefix): value for name, value in state.items()} if shared else state


def facts(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a training of ours noted in its checkpoint (``epoch, batch, batch_size, ...``); empty for other files.

    Raises:
        CheckpointError: the note is not one that `write` was given.
    """
    noted = content.get("vitscope", {})
    plain = isinstance(noted, dict) and all(type(value) in (int, str) for value in noted.values())
    if not plain or type(content.get("global_step", 0)) is not int:
        raise CheckpointError(
            "ckpt_path", path, "its note of where training stood is damaged", "use another checkpoint"
        )
    if noted and not all(type(noted.get(key)) is int and noted[key] >= 0 for key in ("epoch", "batch")):
        raise CheckpointError("ckpt_path", path, "it does not say where training stood", "use another checkpoint")
    return noted


def _write_manifest(folder: Path, entries: Mapping[str, Any], pending: Mapping[str, Any] | None = None) -> None:
    write_atomically(folder / MANIFEST, _manifest_text(entries, pending or {}))


def _manifest_text(entries: Mapping[str, Any], pending: Mapping[str, Any]) -> bytes:
    tree = {**entries, **({_PENDING: pending} if pending else {})}
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return json.dumps({**tree, _DIGEST: digest}, indent=1, sort_keys=True).encode()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_plain(value: Any, place: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (
                str,
                int,
                float,
                bool,
            ):  # a number of numpy's is an instance of float and is not read back
                raise CheckpointError(place, repr(key), f"a key of type {type(key).__name__}", "use text or numbers")
            _check_plain(item, f"{place}.{key}")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor | torch.Size):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(place, None, f"holds a {kind}, which cannot be read back safely", "save plain values")
