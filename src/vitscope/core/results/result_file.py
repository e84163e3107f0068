"""Files of results: one NumPy archive without pickled objects, which holds every field and the objective card."""

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
from vitscope.runtime import safe_files, trusted_packages
from vitscope.runtime.atomic_write import write_atomically
from vitscope.runtime.errors import StorageError

#: entry of the archive with everything that is no array, as JSON
_META = "__meta__"

#: raised by one when a file can no longer be read by older versions
FORMAT = 1


def save(result: Any, path: Path) -> Path:
    """Write a result to ``path``, see `vitscope.core.results.result.Result.save`."""
    target = path if path.suffix else path.with_name(f"{path.name}.npz")
    if target.suffix != ".npz":
        raise ValueError(
            f"Expected a path that ends in .npz, received {path.name!r}; pass {path.stem!r} or '{path.stem}.npz'."
        )
    try:
        write_atomically(target, content(result))
    except StorageError as error:
        raise StorageError("path", target, error.why, "free space or choose another folder") from None
    return target


def content(result: Any) -> bytes:
    """Return the bytes of a result's file.

    Raises:
        TypeError: A field is neither an array, a text, a number, a card, nor a tuple or mapping of these.
    """
    from vitscope import __version__

    arrays: dict[str, np.ndarray] = {}
    values = {f.name: _encode(getattr(result, f.name), f.name, arrays) for f in dataclasses.fields(result)}
    kind = type(result)
    meta = {
        "type": f"{kind.__module__}:{kind.__qualname__}",
        "fields": values,
        "measure": kind.__module__.rpartition(".")[2],
        "vitscope": __version__,
        "format": FORMAT,
    }
    buffer = io.BytesIO()
    arrays[_META] = np.array(json.dumps(meta))
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def load(path: Path) -> Any:
    """Return the result that `save` wrote to ``path``; a name without an ending is that of the file with ``.npz``.

    Raises:
        StorageError: The file is damaged, or its type is neither of this package nor of one that ``VITSCOPE_TRUST`` names.
    """
    if not path.suffix and not path.exists():
        path = path.with_name(f"{path.name}.npz")
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        fix = 'pass a file that result.save("name.npz") wrote; a run folder is read by vs.load_results'
        raise StorageError("results", path, problem, fix)
    if path.suffix != ".npz":
        beside = path.with_suffix(".npz")
        fix = f"pass {beside.name}, which has the arrays" if beside.exists() else "pass a file that result.save wrote"
        raise StorageError("results", path, "not an .npz file", fix)
    try:
        with os.fdopen(safe_files.open_to_read(path), "rb") as file, np.load(file, allow_pickle=False) as archive:
            meta = json.loads(str(archive[_META]))
            arrays = {name: archive[name] for name in archive.files if name != _META}
        if meta.get("format", FORMAT) > FORMAT:
            raise ValueError(f"written by vitscope {meta.get('vitscope')}, which is newer")
        module, _, name = meta["type"].partition(":")
        _check_origin(meta["type"], path)
        kind = getattr(importlib.import_module(module), name)
        field_names = {f.name for f in dataclasses.fields(kind)}
        return kind(**{key: _decode(value, arrays) for key, value in meta["fields"].items() if key in field_names})
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, ImportError) as error:
        raise StorageError(
            "results", path, f"not readable as a result ({error})", "delete it and measure again"
        ) from None
    except Exception as error:  # zipfile and zlib raise their own kinds for damaged archives
        raise StorageError("results", path, f"damaged ({error})", "delete it and measure again") from None


def _check_origin(kind: str, path: Path) -> None:
    """Refuse a result whose type is neither a measure's of vitscope nor of a package that the user trusts."""
    module = kind.partition(":")[0]
    if module.startswith("vitscope.diagnostics.") or trusted_packages.is_trusted(module):
        return
    package, fix = module.partition(".")[0], "delete it and measure again"
    if package.isidentifier() and package != "vitscope":
        fix = f"set {trusted_packages.VARIABLE}={package} if that package is your own"
    raise StorageError(
        "results", path, f"not readable as a result (its type {kind!r} is not a vitscope measure's)", fix
    )


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
    ((kind, entry),) = value.items()
    if kind == "array":
        return arrays[entry]
    if kind == "card":
        return ObjectiveCard(**entry)
    if kind == "tuple":
        return tuple(_decode(item, arrays) for item in entry)
    return {key: _decode(item, arrays) for key, item in entry.items()}
