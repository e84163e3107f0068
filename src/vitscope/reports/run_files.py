"""Reading and checking of the files of a run folder: configuration, provenance, metrics log and results."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from vitscope.config import experiment_identity, loading
from vitscope.config.signature_checks import fits
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.measured_results import Measured, tag_of_step
from vitscope.reports.run_entry import END, Entry
from vitscope.runs import metrics_log
from vitscope.runs.run_dir import Run
from vitscope.runtime import safe_files
from vitscope.runtime.errors import StorageError

#: points kept of each curve over training
MOST_POINTS = 120
_CARD_KEYS = {f.name for f in fields(ObjectiveCard)}
_CARD_TYPES = get_type_hints(ObjectiveCard)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_entry(run: Run, whole: bool = True) -> Entry:
    """Read a run folder and check all that a report uses of it.

    Args:
        run: The folder.
        whole: Refuse a result file that is cut short; False leaves it out, since a running training may be writing it.

    Raises:
        StorageError: A file is damaged, or holds a value of another type than vitscope writes.
    """
    cfg = _mapping(run.path / "config.yaml")
    for group in ("model", "data"):
        _require(cfg.get(group), Mapping, run.path / "config.yaml", group)
    for group, key in (("model", "_target_"), ("data", "name")):
        _require(cfg[group].get(key) or "", str, run.path / "config.yaml", f"{group}.{key}")
    for group in ("objective", "optimizer", "trainer", "callbacks", "analysis", "paths"):
        _require(cfg.get(group) or {}, Mapping, run.path / "config.yaml", group)
    _require(cfg.get("seed") or 0, int, run.path / "config.yaml", "seed")
    facts = _mapping(run.path / "provenance.json")
    for key in ("status", "command", "created"):
        _require(facts.get(key) or "", str, run.path / "provenance.json", key)
    if not stat.S_ISDIR(os.stat(run.path).st_mode):
        raise StorageError("runs", run.path, "not a folder", "delete it")
    metrics, curves, last_step = _read_metrics(run.journal)
    safe_files.refuse_links(run.results / "x")
    if os.path.lexists(run.results) and not run.results.is_dir():
        raise StorageError("runs", run.results, "not a folder", "delete it")
    read_results = (_read_result(path, whole) for path in sorted(run.results.glob("*/*.json")))
    measured = [_at_its_step(m, last_step) for m in read_results if m is not None]
    results = sorted(measured, key=lambda m: m.time)
    group = loading.digest(experiment_identity.experiment(cfg, facts))
    return Entry(run, cfg, facts, metrics, curves, tuple(results), group)


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a run's YAML or JSON file holds.

    Raises:
        StorageError: It is damaged, or larger than such a file can be.
    """
    text = safe_files.read_text(path, safe_files.LARGEST)
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        damage = f"{path.name} is damaged ({type(error).__name__})"
        raise StorageError("runs", path.parent, damage, "delete it, or the run") from None
    _require(content, Mapping, path, "its content")
    return content


def _require(value: Any, kind: Any, path: Path, name: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected_kinds = {Mapping: "a mapping", str: "a text", int: "a whole number"}
        expected = expected_kinds.get(kind, getattr(kind, "__name__", "of its kind"))
        raise StorageError("runs", path, f"{name} is a {type(value).__name__}, not {expected}", "delete the run")


def _read_result(path: Path, whole: bool) -> Measured | None:
    """Return what a result's readable file says; one that is cut short is an error if the folder must be whole, else None."""
    tag = path.stem.rpartition("-")[0]
    if path.name.startswith(".") or not tag:
        return None
    try:
        content = _mapping(path)
    except FileNotFoundError:
        return None  # replaced just now
    except StorageError:
        if whole:
            raise
        return None
    if "measure" not in content:
        return None
    scalars, card = content.get("scalars") or {}, content.get("card") or {}
    _require(scalars, Mapping, path, "scalars")
    _require(card, Mapping, path, "card")
    for name, value in scalars.items():
        if value is not None:
            _require_scalar(value, name, path)
    for key in _CARD_KEYS & set(card):
        _require_card_value(card[key], key, path)
    card_fields = {k: v for k, v in card.items() if k in _CARD_KEYS}
    return Measured(
        analysis=path.parent.name,
        tag=tag,
        measure=str(content["measure"]),
        path=path.with_suffix(".npz"),
        scalars=scalars,
        card=ObjectiveCard(**card_fields) if card_fields else None,
        error=str(content.get("error") or ""),
        time=path.stat().st_mtime,
    )


def _at_its_step(measured: Measured, last_step: int | None) -> Measured:
    """Return a result of the end; with the tag of its step where the training went on after it.

    A finished run that is trained further keeps the results of its first end, and whether it measures them again is open.

    Args:
        measured: The result, whose card states the number of steps before it.
        last_step: The last step of the training, counted from 0.
    """
    step = measured.card.step if measured.card is not None else None
    if step is None or last_step is None or step > last_step or measured.tag.partition("-")[0] != END:
        return measured
    return replace(measured, tag=tag_of_step(step) + measured.tag.removeprefix(END))  # of averages: end-ema


def _require_scalar(value: Any, name: str, path: Path) -> None:
    """Refuse a scalar that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StorageError("runs", path, f"scalars.{name} is a {type(value).__name__}, not a number", "measure again")
    if not math.isfinite(value):
        raise StorageError("runs", path, f"scalars.{name} is {value}, which is written as null", "measure again")


def _require_card_value(value: Any, key: str, path: Path) -> None:
    """Refuse a card's value of another kind than its field's, as far as reports sort and compare it."""
    if value is not None and not fits(value, _CARD_TYPES[key]):
        raise StorageError("runs", path, f"card.{key} is a {type(value).__name__}", "measure again")


#: metrics of a split, and the highest value of those that are shares or sums of them
_METRIC = re.compile(r"(train|val|test)/(accuracy|accuracy_top5|brier|ece|loss|nll)")
_HIGHEST = {"accuracy": 1.0, "accuracy_top5": 1.0, "ece": 1.0, "brier": 2.0}


def _require_metric(key: str, value: Any, path: Path) -> None:
    """Refuse a metric that is no number, or a share outside of its range: a table would print it as it is."""
    match = _METRIC.fullmatch(key)
    if match is None or value is None:
        return
    reason = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        reason = f"{key} is a {type(value).__name__}, not a number"
    elif match[2] in _HIGHEST and not -1e-6 <= value <= _HIGHEST[match[2]] + 1e-6 and math.isfinite(value):
        reason = f"{key} is {value:g}, outside of 0 to {_HIGHEST[match[2]]:g}"
    if reason is not None:
        raise StorageError("runs", path, reason, "delete the run, or restore the file from a copy")


#: entries of a row of metrics that are no metrics
_ROW_KEYS = ("step", "epoch", "time", "tag")
#: steps and values of a metric
_Curve = tuple[list[float], list[float]]


def _read_metrics(path: Path) -> tuple[dict[str, float | None], dict[str, _Curve], int | None]:
    """Return each metric's last value (also where it is null), the curves over epochs, and the last step of the training.

    Metrics of a test that came before a step of the training are those of other weights than the last ones: a finished run was
    trained further. They are left out until it has been tested again.
    """
    last: dict[str, float | None] = {}
    last_step: int | None = None
    curves: dict[str, _Curve] = {}
    rows = metrics_log.read(path)
    if os.path.lexists(path) and (not path.is_file() or (not rows and path.stat().st_size > 0)):
        raise StorageError("runs", path, "holds no row of metrics", "delete the run")
    for row in rows:
        step = row.get("step")
        if isinstance(step, int) and any(key.startswith("train/") for key in row):
            last_step = step
            last = {key: value for key, value in last.items() if not key.startswith("test/")}
        for key, value in row.items():
            _require_metric(key, value, path)
            if key in _ROW_KEYS or not isinstance(value, int | float | None):
                continue
            number = float(value) if value is not None and math.isfinite(value) else None
            last[key] = number
            if number is not None and isinstance(step, int) and key.startswith(("train/", "val/")):
                _add_point(curves.setdefault(key, ([], [])), step, number)
    return last, {key: _thinned(*curve) for key, curve in curves.items()}, last_step


def _add_point(curve: _Curve, step: int, value: float) -> None:
    """Add a point to a curve; it takes the place of those from its step on, which a resumed run writes again."""
    steps, values = curve
    while steps and steps[-1] >= step:
        del steps[-1], values[-1]
    steps.append(step)
    values.append(value)


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Return at most MOST_POINTS points: means over equal stretches, so that a noisy curve stays readable."""
    stretch = math.ceil(len(xs) / MOST_POINTS)
    if stretch <= 1:
        return xs, ys
    starts = range(0, len(xs), stretch)
    ends = [xs[start : start + stretch][-1] for start in starts]
    stretches = [ys[start : start + stretch] for start in starts]
    return ends, [math.fsum(values) / len(values) for values in stretches]
