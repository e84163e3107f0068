"""Find the result of an analysis at the step measured before, and keep the vectors that the next measurement begins with.

A result of a series has the numbers of all steps before it. Vectors of the size of the network would make each such file as
large as a checkpoint, so that they are kept beside the results, of the newest step alone: they are written before the result
and those of steps before are deleted after it, so that a kill at any point leaves what the measurement needs when it is repeated.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.analyses.context import AnalysisContext
from vitscope.runs import result_store
from vitscope.runtime import atomic_write, safe_files
from vitscope.runtime.errors import StorageError


def previous(folder: Path, place: AnalysisContext, settings: str) -> Any | None:
    """Return the newest result of the same settings at a step up to the context's own, with its vectors; None without one.

    Args:
        folder: Folder of the analysis's results.
        place: Context of the measurement.
        settings: Digits that name the analysis's settings.
    """
    candidates = []
    for path in folder.glob(f"*-{settings}.npz"):
        step = _step_of(path, settings)
        if path.stem != f"{place.tag}-{settings}" and step is not None and step <= place.step:
            candidates.append((step, _vectors_file(folder, path.stem).is_file(), path))
    for _, _, path in sorted(candidates, reverse=True):
        try:
            return _with_vectors(result_store.load(path), _vectors_file(folder, path.stem))
        except StorageError:  # a damaged one: the series goes on from the one before
            continue
    return None


def set_vectors_aside(folder: Path, stem: str, result: Any) -> Any:
    """Write the vectors of a result beside its file, and return the result without them."""
    names = getattr(type(result), "carried_fields", ())
    if not names:
        return result
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: getattr(result, name) for name in names})
    atomic_write.write_atomically(_vectors_file(folder, stem), buffer.getvalue())
    return dataclasses.replace(result, **{name: _empty(getattr(result, name)) for name in names})


def delete_earlier_vectors(folder: Path, stem: str, result: Any) -> None:
    """Delete the vectors of other results of the same settings, once a result is saved."""
    if not getattr(type(result), "carried_fields", ()):
        return
    settings = stem.rpartition("-")[2]
    for file in folder.glob(f".vectors-*-{settings}"):
        if file != _vectors_file(folder, stem):
            file.unlink(missing_ok=True)


def _vectors_file(folder: Path, stem: str) -> Path:
    return folder / f".vectors-{stem}"


def _empty(array: np.ndarray) -> np.ndarray:
    return np.zeros((0,) * array.ndim, array.dtype)


def _with_vectors(result: Any, file: Path) -> Any:
    """Return a result with the vectors of a file; without them where it is not there or not whole."""
    if not file.is_file():
        return result
    safe_files.refuse_links(file)
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
            return dataclasses.replace(result, **dict(_arrays(archive, result)))
    except (OSError, ValueError, EOFError, KeyError):
        return result


def _arrays(archive: Any, result: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in type(result).carried_fields:
        yield name, archive[name]


def _step_of(path: Path, settings: str) -> int | None:
    """Return the step of a result: its tag's, else its card's; None where neither states it."""
    tag = path.stem.removesuffix(f"-{settings}")
    if matched := re.fullmatch(r"step-(\d+)", tag):
        return int(matched[1])
    if tag == "init":
        return 0
    try:
        card = json.loads(safe_files.read_text(path.with_suffix(".json"))).get("card") or {}
    except (OSError, ValueError, StorageError):
        return None
    step = card.get("step") if isinstance(card, dict) else None
    return step if isinstance(step, int) else None
