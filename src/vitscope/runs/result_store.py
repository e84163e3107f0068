"""Results on disk: one ``.npz`` per result that holds everything, and a readable ``.json`` beside it.

The ``.npz`` alone is what is read back: it is replaced atomically, so a crash leaves the old result or the new one, never
a mixture. The ``.json`` mirrors its scalars and its objective card for people and scripts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitscope.core.results import result_file
from vitscope.core.results.result_file import finite as finite
from vitscope.core.results.result_file import load as load
from vitscope.runtime.atomic_write import write_atomically


def save(folder: Path, stem: str, result: Any) -> Path:
    """Write a measure's result as ``<stem>.npz`` and ``<stem>.json`` in ``folder``; return the ``.npz``.

    Raises:
        StorageError: The disk is full or not writable; an earlier result of that name is left as it was.
    """
    target = folder / f"{stem}.npz"
    write_atomically(target, result_file.content(result))
    save_readable_copy(folder, stem, result)
    return target


def save_readable_copy(folder: Path, stem: str, result: Any) -> None:
    """Write the ``.json`` beside a result's ``.npz``: its scalars and its objective card.

    Raises:
        StorageError: The disk is full or not writable.
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
