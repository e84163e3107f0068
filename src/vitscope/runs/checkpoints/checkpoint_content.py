"""Content of a checkpoint: its digest, the types that it may hold, and the facts that a training notes in it."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitscope.runtime.errors import CheckpointError

#: key of a checkpoint that holds the digest of all its other entries
CONTENT_DIGEST = "content_sha256"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.Size, torch.dtype, torch.device)


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


def facts(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a training of ours noted in its checkpoint (``epoch, batch, batch_size, ...``); empty for other files.

    Raises:
        CheckpointError: The note is not one that `write` was given.
    """
    if "vitscope" not in content:  # of another program, whose own counters may be of any type
        return {}
    noted = content["vitscope"]
    plain = isinstance(noted, dict) and all(type(value) in (int, str) for value in noted.values())
    if not plain or type(content.get("global_step", 0)) is not int:
        raise CheckpointError(
            "ckpt_path", path, "its record of the training position is damaged", "use another checkpoint"
        )
    if noted and not all(type(noted.get(key)) is int and noted[key] >= 0 for key in ("epoch", "batch")):
        raise CheckpointError("ckpt_path", path, "it has no record of the training position", "use another checkpoint")
    return noted


def completed_steps(content: Mapping[str, Any]) -> int:
    """Return the number of optimizer steps that a checkpoint states; 0 where it states none as a whole number."""
    stated_steps = content.get("global_step", 0)
    return stated_steps if type(stated_steps) is int else 0


def check_plain(value: Any, place: str) -> None:
    """Check that a tree holds only what `torch.load` reads back with ``weights_only=True``.

    Args:
        value: Container, number, text or tensor.
        place: Path of the value in the checkpoint, for the error.

    Raises:
        CheckpointError: A key or an entry of another type, named by its place.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            # a number of numpy's is an instance of float and is not read back
            if type(key) not in (str, int, float, bool):
                raise CheckpointError(place, repr(key), f"a key of type {type(key).__name__}", "use text or numbers")
            check_plain(item, f"{place}.{key}")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor | torch.Size):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(place, None, f"holds a {kind}, which cannot be read back safely", "save plain values")
