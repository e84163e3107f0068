"""Checkpoints that are whole or not there: atomic writes, a manifest of hashes, no pickled code.

A file is written beside its target, flushed to the disk and renamed; then ``manifest.json`` is replaced in the same way.
A file that the manifest does not vouch for is not resumed from. Reading never executes code, whatever the environment says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from vitscope import run_files
from vitscope.errors import CheckpointError, StorageError
from vitscope.results import write_atomically

MANIFEST = "manifest.json"
_FORCED = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")
#: where checkpoints keep the weights, and what wrappers put before their names
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("model.", "module.", "_orig_mod.")
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.Size, torch.dtype, torch.device)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to write and read checkpoints, replaced by `write` and `read`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; the options of remote stores do not apply."""
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a verified file on the CPU, never executing anything."""
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file and its line in the manifest."""
        path = Path(path)
        run_files.refuse_links(path.parent)
        path.unlink(missing_ok=True)
        entries = manifest(path.parent)
        if entries.pop(path.name, None) is not None:
            _write_manifest(path.parent, entries)


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint of plain containers and tensors to ``path``, then vouch for it in the manifest.

    Raises:
        CheckpointError: it holds something that could not be read back safely, named by its place.
        StorageError: the disk is full or read-only; an earlier file of that name is left as it was.
    """
    _check_plain(checkpoint, "checkpoint")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        run_files.refuse_links(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that waits under that name
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        entry = {
            "sha256": sha256(temporary),
            "bytes": temporary.stat().st_size,
            "epoch": int(checkpoint.get("epoch", 0)),
            "global_step": int(checkpoint.get("global_step", 0)),
        }
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)
        # while torch closes its archive after the system's refusal, it raises one of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        why = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise StorageError(
            "paths.runs", path, f"checkpoint not written ({why})", "free space or choose another folder"
        ) from None
    _write_manifest(path.parent, {**manifest(path.parent), path.name: entry})


def read(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path`` on the CPU.

    Args:
        path: the file.
        verify: compare it with the manifest's hash first, where the manifest lists it.

    Raises:
        CheckpointError: missing, damaged, altered, or holding more than plain containers and tensors.
    """
    run_files.refuse_links(path)
    if not path.is_file():
        raise CheckpointError("ckpt_path", path, "no such file", "name a checkpoint file, or ckpt_path=last")
    if verify and not verified(path):
        raise CheckpointError("ckpt_path", path, "its content is not what was written", "use another checkpoint")
    kept = {key: os.environ.pop(key) for key in _FORCED if key in os.environ}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the readers of archives and pickles raise anything
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            "ckpt_path", path, f"not a safe checkpoint ({why[:160]})", "use another checkpoint"
        ) from None
    finally:
        os.environ.update(kept)
    if not isinstance(content, dict):
        raise CheckpointError("ckpt_path", path, f"holds a {type(content).__name__}", "use a dictionary of tensors")
    return content


def newest(folder: Path) -> Path:
    """Return the verified checkpoint of ``folder`` with the most steps, warning of damaged ones passed over.

    Raises:
        CheckpointError: none is left.
    """
    entries = manifest(folder)
    ranked = sorted(entries, key=lambda name: (entries[name]["global_step"], name == "last.ckpt"), reverse=True)
    for name in ranked:
        if verified(folder / name):
            return folder / name
        warnings.warn(f"checkpoint {name} is damaged or missing: falling back to an earlier one", stacklevel=2)
    raise CheckpointError("ckpt_path", folder, "no verified checkpoint", "start afresh without ckpt_path")


def verified(path: Path) -> bool:
    """Tell whether the manifest beside ``path`` vouches for it; a file from elsewhere, with no manifest, passes."""
    entries = manifest(path.parent)
    if not entries:
        return path.is_file() and not (path.parent / MANIFEST).exists()
    entry = entries.get(path.name)
    if entry is None or not path.is_file():
        return False
    return path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's entries by file name; empty where it is missing or unreadable.

    Entries that `write` cannot have made (they may come from a stranger) are left out: names that lead elsewhere, sizes or
    hashes that are none.
    """
    try:
        entries = json.loads(run_files.read_text(folder / MANIFEST, run_files.LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = entries if isinstance(entries, dict) else {}
    return {name: entry for name, entry in entries.items() if name == Path(name).name and _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    kinds = {"sha256": str, "bytes": int, "epoch": int, "global_step": int}
    return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Delete the temporary files that dead processes left behind."""
    run_files.refuse_links(folder)
    for file in folder.glob(".*.tmp-*"):
        owner = file.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) != os.getpid() and not Path(f"/proc/{owner}").exists():
            file.unlink(missing_ok=True)


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


def _write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(entries, indent=1).encode())


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
