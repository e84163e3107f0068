"""Summaries of run folders for a list of runs: state, main metrics, what was measured, size and age; filters and order."""

from __future__ import annotations

import datetime
import fnmatch
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity
from vitscope.reports.run_entry import Entry
from vitscope.runs import run_lock
from vitscope.runs.run_dir import Run
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

STATES = ("finished", "stopped", "running", "failed", "unknown")
FILTERS = ("model", "data", "experiment", "state", "tags")
SORT_KEYS = ("id", "model", "data", "experiment", "seed", "state", "size", "age")
#: main metrics in the order in which they are shown
MAIN_METRICS = ("test/accuracy", "test/nll", "test/ece", "val/accuracy", "val/nll", "train/loss")
#: a summary in words names this many metrics
_MOST_METRICS = 3


@dataclass(frozen=True)
class Summary:
    """One run in a list.

    Attributes:
        entry: Configuration, provenance, metrics and results of the run.
        experiment: Names of ``conf/experiment`` with which the run was started, joined by commas; empty for none.
        tags: Tags that the configuration states.
        state: One of `STATES`; ``running`` only while a living process holds the run's lock.
        sizes: Bytes on disk by part: ``checkpoints``, ``results``, ``figures``, ``wandb``, ``other``.
        age_s: Seconds since the run was made.
    """

    entry: Entry
    experiment: str
    tags: tuple[str, ...]
    state: str
    sizes: Mapping[str, int]
    age_s: float

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes.values())

    def main_metrics(self) -> dict[str, float]:
        """Return the main metrics of the journal; where it has none, those of the newest ``evaluation`` result."""
        metrics = self.entry.metrics
        values = {name: value for name in MAIN_METRICS if (value := metrics.get(name)) is not None}
        if not values:
            for result in self.entry.results:
                if result.measure == "evaluation" and not result.error:
                    scalars = {name: result.scalars.get(name) for name in ("accuracy", "nll")}
                    values |= {f"evaluation/{name}": value for name, value in scalars.items() if value is not None}
        return dict(list(values.items())[:_MOST_METRICS])

    def measured(self) -> dict[str, list[str]]:
        """Return the tags at which each analysis has a result."""
        tags: dict[str, list[str]] = {}
        for tag in self.entry.tags():
            for analysis in sorted({m.analysis for m in self.entry.results if m.tag == tag and not m.error}):
                tags.setdefault(analysis, []).append(tag)
        return tags

    def failures(self) -> dict[str, str]:
        """Return the reason of each measurement that failed, by ``analysis@tag``."""
        return {f"{m.analysis}@{m.tag}": m.error for m in self.entry.results if m.error}

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values for JSON."""
        entry = self.entry
        return {
            "id": entry.run.id,
            "path": str(entry.run.path),
            "model": experiment_identity.short_name(entry.config),
            "label": entry.label,
            "data": entry.data,
            "experiment": self.experiment,
            "tags": list(self.tags),
            "seed": entry.seed,
            "command": entry.facts.get("command"),
            "state": self.state,
            "metrics": dict(entry.metrics),
            "measured": self.measured(),
            "failed": self.failures(),
            "size_bytes": self.size,
            "sizes_bytes": dict(self.sizes),
            "created": entry.facts.get("created"),
            "age_s": round(self.age_s),
        }


def summarize(entry: Entry) -> Summary:
    """Return the summary of a run.

    Raises:
        StorageError: The run's lock is a link or no regular file.
    """
    tags = entry.config.get("tags")
    stated_tags = tuple(map(str, tags)) if isinstance(tags, list) else ()
    return Summary(
        entry, experiment_name(entry.facts), stated_tags, state(entry), sizes(entry.run), age(entry, time.time())
    )


def state(entry: Entry) -> str:
    """Return the state of a run; one that is recorded as running and whose process is gone is ``stopped``."""
    if run_lock.living_holder(entry.run.path) is not None or run_lock.holds(entry.run.path):
        return "running"
    if entry.status == "running":
        return "stopped"
    return entry.status if entry.status in STATES else "unknown"


def experiment_name(facts: Mapping[str, Any]) -> str:
    """Return the experiments that the recorded command line names, joined by commas."""
    arguments = facts.get("arguments")
    if not isinstance(arguments, list):
        return ""
    for argument in reversed(arguments):
        if match := re.fullmatch(r"\+{0,2}experiment=(.*)", str(argument)):
            return ",".join(name.strip() for name in match[1].strip("[]'\"").split(",") if name.strip() != "null")
    return ""


def sizes(run: Run) -> dict[str, int]:
    """Return the bytes of the regular files of a run by part; links are not followed."""
    parts: dict[str, int] = dict.fromkeys(("checkpoints", "results", "figures", "wandb", "other"), 0)
    for folder, _, names in os.walk(run.path):
        top = Path(folder).relative_to(run.path).parts[:1]
        part = top[0] if top and top[0] in parts else "other"
        for name in names:
            try:
                parts[part] += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # replaced just now by the run's process
                continue
    return parts


def age(entry: Entry, now: float) -> float:
    """Return the seconds from the recorded creation of a run to ``now``; by its configuration's file where none is recorded."""
    try:
        created = datetime.datetime.fromisoformat(str(entry.facts.get("created", ""))).timestamp()
    except ValueError:
        created = (entry.run.path / "config.yaml").stat().st_mtime
    return max(0.0, now - created)


def matching(summaries: Sequence[Summary], patterns: Mapping[str, str]) -> list[Summary]:
    """Return the runs that match every pattern.

    Args:
        summaries: Runs.
        patterns: By name of `FILTERS`: alternatives, separated by commas, each of which may hold the wildcards ``*``, ``?``
            and ``[...]``. ``experiment`` also matches a tag, ``model`` the model's family, its name with size or its label.

    Raises:
        ConfigError: A state that does not exist.
    """
    for name in patterns.get("state", "").split(","):
        if name and not set("*?[") & set(name) and name not in STATES:
            raise ConfigError("state", name, "no such state", errors.nearest(name, STATES))
    return [s for s in summaries if all(_matches(s, key, pattern) for key, pattern in patterns.items())]


def _matches(summary: Summary, key: str, pattern: str) -> bool:
    entry = summary.entry
    values = {
        "model": [entry.family, experiment_identity.short_name(entry.config), entry.label],
        "data": [entry.data, entry.data.partition(" ")[0]],
        "experiment": [summary.experiment, *summary.experiment.split(","), *summary.tags],
        "state": [summary.state],
        "tags": list(summary.tags),
    }[key]
    alternatives = [pattern, *pattern.split(",")]
    return any(fnmatch.fnmatchcase(v.lower(), a.strip().lower()) for v in values for a in alternatives)


def ordered(summaries: Sequence[Summary], key: str) -> list[Summary]:
    """Return the runs in ascending order of a key, descending where it opens with ``-``; runs without a value come last.

    Args:
        summaries: Runs.
        key: One of `SORT_KEYS`, or a metric such as ``test/accuracy``.

    Raises:
        ConfigError: No such key, and no run has such a metric.
    """
    name = key.removeprefix("-")
    metrics = sorted({metric for s in summaries for metric in s.entry.metrics})
    if name not in SORT_KEYS and name not in metrics and summaries:
        raise ConfigError("sort", key, "no such key", errors.nearest(name, [*SORT_KEYS, *metrics]))
    with_value = [s for s in summaries if _value(s, name) is not None]
    without_value = [s for s in summaries if _value(s, name) is None]
    return sorted(with_value, key=lambda s: _value(s, name), reverse=key.startswith("-")) + without_value


def _value(summary: Summary, name: str) -> Any:
    if name in SORT_KEYS:
        values = {"size": summary.size, "age": summary.age_s, "seed": summary.entry.seed, "id": summary.entry.run.id}
        values |= {"model": summary.entry.label, "data": summary.entry.data, "experiment": summary.experiment}
        return (values | {"state": summary.state})[name]
    value = summary.entry.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def resolve(names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    """Return the runs that ids, unique beginnings of ids, or paths of run folders name; each run once.

    Raises:
        ConfigError: A name that no run has, or more than one.
    """
    return list(dict.fromkeys(_resolve_one(name, runs) for name in names))


def _resolve_one(name: str, runs: Sequence[Run]) -> Run:
    equal = [run for run in runs if run.id == name]
    matches = equal or [run for run in runs if name and run.id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if not equal and (os.sep in name or os.path.lexists(name)):
        path = Path(os.path.abspath(name))
        if not all((path / file).is_file() for file in ("config.yaml", "provenance.json")):
            reason = "no run folder (config.yaml and provenance.json are not both in it)"
            raise ConfigError("run", name, reason, "name a run folder or an id of `vitscope runs list`")
        return Run(path)
    if matches:
        paths = ", ".join(str(run.path) for run in matches[:5]) + (", ..." if len(matches) > 5 else "")
        raise ConfigError("run", name, f"names {len(matches)} runs ({paths})", "give more of the id, or the path")
    ids = [run.id for run in runs]
    raise ConfigError("run", name, "no such run", errors.nearest(name, ids) if ids else "runs=<folder> names the root")
