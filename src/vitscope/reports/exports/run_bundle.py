"""Export of runs into a folder or a zip file that another person's report reads: everything of a run but its weights.

Layout: ``bundle.json runs.csv <id>/{config.yaml, provenance.json, metrics.jsonl, results/, figures/}``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitscope.reports.run_listing import Summary
from vitscope.runs.metrics_log import FILE as METRICS
from vitscope.runs.run_dir import Run
from vitscope.runtime import redaction, safe_files
from vitscope.runtime.atomic_write import temporary_path, write_atomically
from vitscope.runtime.errors import ConfigError, StorageError

#: file that marks a folder as a bundle
MARKER = "bundle.json"
#: endings of the files that are exported from the folders of a run
ENDINGS = {"results": (".npz", ".json", ".csv"), "figures": (".png", ".pdf", ".svg", ".csv", ".json", ".html")}


def export(summaries: Sequence[Summary], target: Path, overwrite: bool = False) -> int:
    """Write runs into a bundle, which appears whole or not at all.

    Args:
        summaries: The runs.
        target: A folder, or a file that ends with ``.zip``.
        overwrite: Replace a file, or a folder that is a bundle.

    Returns:
        Number of files in the bundle.

    Raises:
        ConfigError: The target exists, or two runs have one id.
        StorageError: A run's file is a link or cannot be read, or the target cannot be written.
    """
    _check(summaries, target, overwrite)
    files = _contents(summaries)
    try:
        if target.suffix == ".zip":
            write_atomically(target, _zipped(files, target.stem))
        else:
            _write_folder(files, target)
    except OSError as error:
        raise StorageError(
            "to", target, f"not written ({error.strerror})", "free space or choose another place"
        ) from None
    return len(files)


def _check(summaries: Sequence[Summary], target: Path, overwrite: bool) -> None:
    ids = [summary.entry.run.id for summary in summaries]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError("run", name, "the id of several of these runs", "export them into different bundles")
    for summary in summaries:
        if target.absolute().is_relative_to(summary.entry.run.path.absolute()):
            raise ConfigError("to", target, "inside of an exported run", "choose a place outside of it")
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise ConfigError("to", target, "a symbolic link", "choose another name")
    if not overwrite:
        raise ConfigError("to", target, "exists already", "choose another name, or add overwrite=true")
    if target.suffix == ".zip" and not target.is_file():
        raise ConfigError("to", target, "not a file", "choose another name")
    if target.suffix != ".zip" and not (target / MARKER).is_file():
        raise ConfigError(
            "to", target, f"no bundle ({MARKER} is not in it), so it is not replaced", "choose another name"
        )


def _contents(summaries: Sequence[Summary]) -> dict[str, bytes]:
    """Return the bundle's files by their paths in it."""
    files = {f"{s.entry.run.id}/{name}": content for s in summaries for name, content in _run_files(s.entry.run)}
    marker = {"kind": "vitscope runs", "runs": [s.entry.run.id for s in summaries], "files": sorted(files)}
    return {MARKER: json.dumps(marker, indent=2).encode(), "runs.csv": _table(summaries), **files}


def _run_files(run: Run) -> Iterator[tuple[str, bytes]]:
    """Yield paths and contents of what is exported from a run."""
    for name in ("config.yaml", "provenance.json", METRICS):
        if os.path.lexists(run.path / name):
            yield name, _read(run.path / name)
    for part, endings in ENDINGS.items():
        safe_files.refuse_links(run.path / part / "x")
        for folder, folders, names in os.walk(run.path / part):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.endswith(endings) and not name.startswith("."):
                    path = Path(folder, name)
                    yield path.relative_to(run.path).as_posix(), _read(path)


def _read(path: Path) -> bytes:
    """Return a file's bytes; a configuration or a JSON file that holds a secret is written anew without it.

    A run's files are written without secrets. They are looked for once more with those that this environment knows.
    """
    try:
        with os.fdopen(safe_files.open_to_read(path), "rb") as file:
            content = file.read()
    except OSError as error:
        raise StorageError("run", path, f"not readable ({error.strerror})", "make it readable") from None
    if path.suffix == ".yaml":
        tree = yaml.safe_load(content)
        clean = redaction.redacted(tree)
        return content if clean == tree else yaml.safe_dump(clean, sort_keys=False).encode()
    if path.suffix == ".json":
        tree = json.loads(content)
        clean = redaction.redacted(tree)
        return content if clean == tree else json.dumps(clean, indent=2).encode()
    return content


def _table(summaries: Sequence[Summary]) -> bytes:
    """Return a CSV with one row a run and one column a metric."""
    rows = [_row(summary) for summary in summaries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _row(summary: Summary) -> dict[str, Any]:
    facts = summary.to_dict()
    names = ("id", "label", "data", "experiment", "seed", "state", "created")
    measured = " ".join(f"{name}@{tag}" for name, tags in facts["measured"].items() for tag in tags)
    return {name: facts[name] for name in names} | {"measured": measured} | facts["metrics"]


def _zipped(files: dict[str, bytes], top: str) -> bytes:
    """Return a zip archive with the files in one folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)
    return buffer.getvalue()


def _write_folder(files: dict[str, bytes], target: Path) -> None:
    """Write the files beside the target and rename their folder to it; a bundle that stood there is deleted last."""
    target = target.absolute()
    beside = temporary_path(target)
    previous = beside.with_name(f"{beside.name}-previous")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for name, content in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(content)
        if target.exists():
            os.rename(target, previous)
        try:
            os.rename(beside, target)
        except OSError:
            if previous.exists():
                os.rename(previous, target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
