"""Read the contents of a file of weights without executing code: torch's archives, its older pickles, and safetensors."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from vitscope.runs.checkpoints.plain_objects import SAFE_GLOBALS
from vitscope.runtime.errors import CheckpointError

#: names of the attributes of a pickled `torch.nn.Module`
_OF_A_MODULE = (b"_parameters", b"_buffers", b"_modules")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
#: torch's message for a pickle, after its advice to load the file without safety
_PICKLE_REASON = re.compile(r"WeightsUnpickler error:\s*([^\n]+)")
#: bytes at the beginning of a file that hold its pickle, where it is no archive
_PICKLE_BYTES = 1 << 22
_SAVE = "save model.state_dict() instead"


def load_plain(path: Path) -> Any:
    """Return the contents of a file of weights, tensors on the CPU.

    Raises:
        CheckpointError: The file is empty, encrypted, no file of weights, or holds objects that could execute code.
    """
    reason = _unreadable(path)
    if reason is not None:
        raise CheckpointError("ckpt_path", path, *reason)
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the readers of archives and pickles raise anything
        raise CheckpointError("ckpt_path", path, *_refusal(path, error)) from None


def _unreadable(path: Path) -> tuple[str, str] | None:
    """Return why a file is none of weights and what to do, from its first bytes; None where they do not tell."""
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        return "the file is empty", "copy or save it again"
    if first.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"
    if first.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a page of HTML, not a file of weights", "download the file itself"
    if first.startswith(b"PK") and _is_encrypted(path):
        return "an encrypted archive", "save the state dict without a password"
    return None


def _is_encrypted(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.flag_bits & 1 for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _is_safetensors(path: Path) -> bool:
    """Tell whether a file begins with the length of a JSON header and the header itself."""
    with path.open("rb") as file:
        first = file.read(9)
    length = int.from_bytes(first[:8], "little")
    return len(first) == 9 and first[8:] == b"{" and 2 <= length <= path.stat().st_size - 8


def _refusal(path: Path, error: Exception) -> tuple[str, str]:
    """Return why a file was not read, and what to do."""
    text = str(error).strip()
    named = _GLOBAL.search(text)
    if "TorchScript" in text:
        return "holds a TorchScript program, which is not loaded since it could execute code", _SAVE
    if named is not None and all(mark in _pickle(path) for mark in _OF_A_MODULE):
        return f"holds a pickled module ({named[1]}), which is not loaded since it could execute code", _SAVE
    if named is not None:
        return f"not a safe checkpoint (it names {named[1]}, which could execute code)", "save tensors and plain values"
    stated = _PICKLE_REASON.search(text)
    reason = type(error).__name__
    if stated:
        reason = stated[1].strip()
    elif text:
        reason = text.splitlines()[0]
    return f"not a safe checkpoint ({reason[:160]})", "use another checkpoint"


def _pickle(path: Path) -> bytes:
    """Return the bytes of a file's pickle: of its archive's member, or the beginning of an older file."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(member) as file:
                return file.read(_PICKLE_BYTES)
    except (zipfile.BadZipFile, StopIteration, OSError, ValueError, NotImplementedError, RuntimeError):
        with path.open("rb") as file:
            return file.read(_PICKLE_BYTES)
