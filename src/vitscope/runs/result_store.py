"""Results on disk: one ``.npz`` a result that holds everything, and a readable ``.json`` beside it.

The ``.npz`` alone is what is read back: it is replaced atomically, so a crash leaves the old result or the new one, never
a mixture. The ``.json`` mirrors its scalars and its objective card for people and scripts.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.core.objective_card import ObjectiveCard
from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import write_atomically
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
        field_names = {f.name for f in dataclasses.fields(kind)}
        return kind(**{key: _decode(value, arrays) for key, value in meta["fields"].items() if key in field_names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, ImportError) as error:
        raise StorageError(
            "results", path, f"not readable as a result ({error})", "delete it and measure again"
        ) from None
    except Exception as error:  # zipfile and zlib raise their own kinds for damaged archives
        raise StorageError("results", path, f"damaged ({error})", "delete it and measure again") from None


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
