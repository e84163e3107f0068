"""Index of the runs of a report: configurations, metrics and scalars of results; arrays are read when they are drawn."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from vitscope.config import experiment_identity, loading
from vitscope.config.signature_checks import fits
from vitscope.core.objective_card import ObjectiveCard, differing_keys, shown_value
from vitscope.reports import model_family
from vitscope.runs import metrics_log, result_store
from vitscope.runs.run_dir import Run
from vitscope.runtime import redaction, safe_files
from vitscope.runtime.errors import StorageError, VitscopeError

#: keys of the card in which results of one table may differ: rows name their data themselves
NAMED_BY_ROWS = ("data",)

#: keys of the card that follow from the run's own configuration, in which experiments of a figure over such a key differ
OF_THE_RUN = ("data", "loss", "l2", "weight_decay", "augmentation")

#: an analysis and everything that its card compares, as sorted pairs: results that share them may be compared
Conditions = tuple[tuple[str, Any], ...]

#: points kept of each curve over training
MOST_POINTS = 120

_CARD_KEYS = {f.name for f in fields(ObjectiveCard)}
_CARD_TYPES = get_type_hints(ObjectiveCard)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Measured:
    """One result on disk, or the record of a measure that failed.

    Attributes:
        analysis: The configuration's name for it.
        tag: ``init``, ``epoch-0099`` or ``end``.
        measure: The function that made it.
        path: The ``.npz``.
        scalars: Numbers by name; None for one that is not finite.
        card: Conditions of the measurement.
        error: Reason why there is no result, else empty.
        time: Modification time of the file, in seconds, to find the newest result.
    """

    analysis: str
    tag: str
    measure: str
    path: Path
    scalars: Mapping[str, float | None]
    card: ObjectiveCard | None
    error: str
    time: float

    def load(self) -> Any:
        """Return the result with its arrays.

        Raises:
            StorageError: The file is damaged or gone.
        """
        return result_store.load(self.path)

    def conditions(self, without: Sequence[str] = ()) -> Conditions:
        """Return the analysis and all that the card compares but for ``without``, see `Conditions`."""
        compared = {"card": "none"} if self.card is None else self.card.conditions()
        return (("analysis", self.analysis), *(pair for pair in compared.items() if pair[0] not in without))


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        run: Folder of the run.
        config: Resolved configuration as plain containers.
        facts: Provenance of the run.
        metrics: Each metric's last value; None is one that was not finite.
        curves: Steps and values of each training and validation metric.
        results: Results of analyses, by age.
        group: Digest of the experiment, the seed left out.
        label: The experiment's name in this report.
        superseded: Whether a later run repeats it (then only the list of runs shows it).
    """

    run: Run
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    curves: Mapping[str, tuple[list[float], list[float]]] = field(repr=False)
    results: tuple[Measured, ...] = field(repr=False)
    group: str = ""
    label: str = ""
    superseded: bool = False

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.run.id

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed") or 0)

    @property
    def status(self) -> str:
        """``finished``, ``failed``, ``stopped``, ``running`` or ``unknown``."""
        return str(self.facts.get("status", "unknown"))

    @property
    def trained(self) -> bool:
        """Whether the run is a training (rather than an analysis of a model that was not trained here)."""
        return self.facts.get("command") != "analyze"

    @property
    def untrained(self) -> bool:
        """Whether one of our models was analysed as it was built, without weights from anywhere."""
        node = self.config.get("model") or {}
        is_builtin = str(node.get("_target_", "")).startswith("vitscope.models.")
        return is_builtin and not (self.trained or node.get("pretrained") or self.config.get("ckpt_path"))

    @property
    def family(self) -> str:
        """The model's builder."""
        return experiment_identity.family(self.config)

    @property
    def kin(self) -> str:
        """The family of the paper that the model belongs to, timm's by the kinds of their units."""
        return model_family.kin(self.config, self.facts)

    @property
    def data(self) -> str:
        """The data set's name, with the share that was trained on."""
        node = self.config.get("data") or {}
        fraction = node.get("fraction", 1.0)
        return f"{node.get('name', '?')}" + (f" ({fraction:g})" if fraction != 1 else "")

    def tags(self) -> list[str]:
        """Return the moments at which something was measured, in their order."""
        return sorted({m.tag for m in self.results}, key=moment)


@dataclass(frozen=True)
class Damage:
    """A run folder that a report leaves out.

    Attributes:
        path: The folder.
        why: Description of the damage.
    """

    path: Path
    why: str

    def __str__(self) -> str:
        """Return the line of standard error."""
        return redaction.masked(" ".join(f"damaged: {self.path}: {self.why}; left out".split()))


def moment(tag: str) -> tuple[int, str]:
    """Sort key of tags: ``init``, the epochs, ``end``."""
    return {"init": 0, "end": 2}.get(tag, 1), tag


def collect(runs: Sequence[Run], damaged: list[Damage] | None = None) -> list[Entry]:
    """Return the entries of ``runs`` with their labels, runs of one experiment together, by data, label and seed.

    Args:
        runs: Run folders.
        damaged: List to which unreadable folders are added; they are left out. None: the first one raises its error.

    Where an experiment was run twice with one seed, the newest finished run counts and the others are superseded.
    """
    entries = [entry for run in runs if (entry := _readable(run, damaged)) is not None]
    groups = {entry.group: entry.config for entry in entries}
    labels = experiment_identity.labels(groups)
    counting: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        best = counting.setdefault((entry.group, entry.seed), entry)
        if _rank(entry) >= _rank(best):
            counting[entry.group, entry.seed] = entry
    counting_ids = {entry.id for entry in counting.values()}
    labelled = [
        replace(
            entry,
            label=labels[entry.group] + (", random weights" if entry.untrained else ""),
            superseded=entry.trained and entry.id not in counting_ids,
        )
        for entry in entries
    ]
    return sorted(labelled, key=lambda e: (e.data, e.family, _natural(e.label), e.group, e.superseded, e.seed, e.id))


def _rank(entry: Entry) -> tuple[bool, str, str]:
    return entry.status == "finished", str(entry.facts.get("created", "")), entry.id


def _natural(text: str) -> tuple[Any, ...]:
    parts = [part for part in text.replace(",", " ").split() if part]
    return tuple((0, float(p), "") if p.replace(".", "", 1).isdigit() else (1, 0.0, p) for p in parts)


def _readable(run: Run, damaged: list[Damage] | None) -> Entry | None:
    """Return a run's entry, None for a damaged one; whatever is derived from it is tried here, not in a table."""
    try:
        entry = _read(run, whole=damaged is not None)
        _ = (entry.seed, entry.status, entry.family, entry.kin, entry.data, entry.untrained, entry.tags(), _rank(entry))
        experiment_identity.labels({entry.group: entry.config})
        return entry
    except Exception as error:  # a stranger's folder may hold anything
        if damaged is None:
            raise
        damaged.append(Damage(run.path, _reason(error)))
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, VitscopeError):
        return f"{error.value}: {error.why}" if error.value is not None else error.why
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _read(run: Run, whole: bool = True) -> Entry:
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
    metrics, curves = _read_metrics(run.journal)
    safe_files.refuse_links(run.results / "x")
    if os.path.lexists(run.results) and not run.results.is_dir():
        raise StorageError("runs", run.results, "not a folder", "delete it")
    measured = [m for path in sorted(run.results.glob("*/*.json")) if (m := _read_result(path, whole))]
    results = sorted(measured, key=lambda m: m.time)
    experiment = {
        **experiment_identity.identity(cfg),
        "weights": cfg.get("ckpt_path") if facts.get("command") == "analyze" else None,
    }
    return Entry(run, cfg, facts, metrics, curves, tuple(results), loading.digest(experiment))


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
        expected = {Mapping: "a mapping", str: "a text", int: "a whole number"}.get(
            kind, getattr(kind, "__name__", "of its kind")
        )
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
        if value is not None and (isinstance(value, bool | str) or not isinstance(value, int | float)):
            raise StorageError(
                "runs", path, f"scalars.{name} is a {type(value).__name__}, not a number", "measure again"
            )
        if value is not None and not math.isfinite(value):
            raise StorageError("runs", path, f"scalars.{name} is {value}, which is written as null", "measure again")
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


def _read_metrics(path: Path) -> tuple[dict[str, float | None], dict[str, tuple[list[float], list[float]]]]:
    """Return each metric's last value (also where it is null), and the curves over epochs."""
    last: dict[str, float | None] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    rows = metrics_log.read(path)
    if os.path.lexists(path) and (not path.is_file() or (not rows and path.stat().st_size > 0)):
        raise StorageError("runs", path, "holds no row of metrics", "delete the run")
    for row in rows:
        step = row.get("step")
        for key, value in row.items():
            _require_metric(key, value, path)
            if key in ("step", "epoch", "time", "tag") or not (value is None or isinstance(value, int | float)):
                continue
            value = value if value is not None and math.isfinite(value) else None
            last[key] = None if value is None else float(value)
            if key.startswith(("train/", "val/")) and value is not None and isinstance(step, int):
                xs, ys = curves.setdefault(key, ([], []))
                xs.append(step)
                ys.append(float(value))
    return last, {key: _thinned(*curve) for key, curve in curves.items()}


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Return at most MOST_POINTS points: means over equal stretches, so that a noisy curve stays readable."""
    stretch = math.ceil(len(xs) / MOST_POINTS)
    if stretch <= 1:
        return xs, ys
    starts = range(0, len(xs), stretch)
    return [xs[min(i + stretch, len(xs)) - 1] for i in starts], [
        math.fsum(ys[i : i + stretch]) / len(ys[i : i + stretch]) for i in starts
    ]


def differing(conditions: Iterable[Conditions]) -> list[str]:
    """Return the keys in which conditions differ."""
    return differing_keys(map(dict, conditions))


def stated(conditions: Conditions, keys: Sequence[str]) -> str:
    """Return the values of some keys in words."""
    return ", ".join(f"{key} {_written(shown_value(dict(conditions), key))}" for key in keys)


def _written(value: Any) -> str:
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, tuple) else str(value)


def majority(measured: Mapping[str, Sequence[Measured]], without: Sequence[str] = NAMED_BY_ROWS) -> Conditions | None:
    """Return the conditions under which most runs were measured (the newest of equals).

    Args:
        measured: Results of one measure at one moment, by run.
        without: Keys of the card that do not count.
    """
    counts: Counter[Conditions] = Counter()
    newest: dict[Conditions, float] = {}
    for results in measured.values():
        successes = [(m.conditions(without), m.time) for m in results if not m.error]
        for conditions, time in successes:
            newest[conditions] = max(newest.get(conditions, 0.0), time)
        counts.update({conditions for conditions, _ in successes})
    return max(counts, key=lambda c: (counts[c], newest[c]), default=None)
