"""Files of an exported study: ``study.json`` (profile, data, what each target reads) and ``runs/<id>.json``, one a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscope.runtime import atomic_write, redaction
from vitscope.runtime.errors import ConfigError, DataError, StorageError

INDEX = "study.json"
#: version of the layout
FORMAT = 1


@dataclass(frozen=True)
class Study:
    """Content of a study's files.

    Attributes:
        folder: Where it was read from.
        profile: Profile of the reproduction.
        targets: Names of the results that each target reads, by run.
        runs: Content of ``runs/<id>.json`` by the run's name.
    """

    folder: Path
    profile: str
    targets: Mapping[str, Mapping[str, Sequence[str]]]
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def data(self) -> list[str]:
        """Names of the data sets of the runs."""
        return sorted({data_name(content["config"]) for content in self.runs.values()})

    @property
    def hours(self) -> float:
        """Hours of all trainings with their tests, to two digits; measurements, and processes before a resume, do not count."""
        return round(sum(float(content["facts"].get("wall_s") or 0.0) for content in self.runs.values()) / 3600, 2)


def data_name(config: Mapping[str, Any]) -> str:
    """Return the name of the data set of a run's configuration, ``?`` where it has none."""
    return str((config.get("data") or {}).get("name", "?"))


def write(study: Study) -> int:
    """Write a study into its folder; return the size of its files in bytes. A study that stands there is replaced.

    Raises:
        ConfigError: The folder holds something else.
    """
    folder = study.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise ConfigError(
            "export", folder, f"no study ({INDEX} is not in it), so it is not replaced", "name a new folder"
        )
    index = {
        "format": FORMAT,
        "profile": study.profile,
        "data": study.data,
        "hours": study.hours,
        "targets": study.targets,
    }
    size = 0
    for name, content in [*((f"runs/{key}.json", study.runs[key]) for key in sorted(study.runs)), (INDEX, index)]:
        text = json.dumps(redaction.redacted(content), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
        atomic_write.write_atomically(folder / name, text)
        size += len(text)
    for path in (folder / "runs").glob("*.json"):  # of the study that stood there, once the new one is whole
        if path.stem not in study.runs:
            path.unlink()
    return size


def read(folder: Path) -> Study:
    """Return the study of a folder.

    Raises:
        DataError: There is no study.
        StorageError: A file is damaged.
    """
    index = read_index(folder)
    keys = sorted({key for of_target in index["targets"].values() for key in of_target})
    runs = {key: _json(folder / "runs" / f"{key}.json") for key in keys}
    for key, content in runs.items():
        for part in ("config", "facts", "metrics", "results"):
            if not isinstance(content.get(part), Mapping):
                reason = f"is no run of a study ({part} is missing)"
                raise StorageError("from", folder / "runs" / f"{key}.json", reason, "restore it, or export it again")
    return Study(folder, str(index["profile"]), index["targets"], runs)


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of ``study.json``.

    Raises:
        DataError: There is no study.
        StorageError: It is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DataError(
            "from", folder, f"no study there ({INDEX} is missing)", "name a folder that export= has written"
        )
    index = _json(path)
    if index.get("format") != FORMAT or not isinstance(index.get("targets"), Mapping):
        raise StorageError("from", path, f"not a study of format {FORMAT}", "export it again")
    return index


def join(parts: Sequence[Study]) -> Study:
    """Return one study of several. A run that two parts hold counts once, with the results of both.

    Args:
        parts: Studies of one profile and the same data sets, at least one; the joined one has the first one's folder.

    Raises:
        ConfigError: Profiles or data sets differ, or a run has other numbers in another part.
    """
    first, *others = parts
    targets = {name: dict(of_target) for name, of_target in first.targets.items()}
    runs = dict(first.runs)
    for part in others:
        for key in ("profile", "data"):
            if getattr(part, key) != getattr(first, key):
                reason = f"its {key} is {getattr(part, key)}, that of {first.folder} is {getattr(first, key)}"
                raise ConfigError("from", part.folder, reason, "name parts of one study")
        for key, content in part.runs.items():
            runs[key] = _joined_run(key, runs[key], content, part.folder) if key in runs else content
        for name, of_target in part.targets.items():
            joined = targets.setdefault(name, {})
            joined.update({key: sorted({*joined.get(key, ()), *results}) for key, results in of_target.items()})
    return Study(first.folder, first.profile, targets, runs)


def _joined_run(key: str, run: Mapping[str, Any], copy: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a run with the metrics and results that it has in two parts; ``folder`` is the part of the copy.

    One part may have been exported before an analysis of the run, whose results and metrics it then lacks. Metrics of an
    analysis, which are those of its last moment, may differ: results hold its numbers.
    """
    fewer, more = sorted((run, copy), key=lambda content: len(content["results"]))
    joined = {part: {**fewer[part], **more[part]} for part in ("metrics", "results")}
    analyses = {name.partition("/")[0] for name in joined["results"]}
    for content in (run, copy):
        metrics = {name: v for name, v in content["metrics"].items() if name.partition("/")[0] not in analyses}
        extended = {
            "metrics": {**joined["metrics"], **metrics},
            "results": {**joined["results"], **content["results"]},
        }
        if _compared({**content, **extended}) != _compared({**run, **joined}):
            reason = f"its run {key} has other numbers than the same run of another part"
            raise ConfigError("from", folder, reason, "export the parts again from their runs")
    return {**run, **joined}


def _compared(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run without the times of its measurements: one that was made twice with the same numbers is the same."""
    results = content["results"].items()
    untimed = {name: {key: value for key, value in result.items() if key != "time"} for name, result in results}
    return {**content, "results": untimed}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(
            "from", path, f"cannot be read ({type(error).__name__})", "restore it, or export it again"
        ) from None
    if not isinstance(content, dict):
        raise StorageError("from", path, "holds no mapping", "restore it, or export it again")
    return content
