"""Estimate time and disk space of planned trials from existing runs of the same kind, else from rates that the plan states.

A training takes its number of steps times the seconds per step of a finished run with the same model, batch, image size,
optimizer and trainer. A measurement takes as long as one with the same model and settings took. What neither tells is unknown.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from vitscope.reproduce import run_kinds
from vitscope.reproduce.planned_work import EXISTS, MEASURE, RESUME, TRAIN, Measurement, PlannedTrial
from vitscope.runs import run_search
from vitscope.runs.run_dir import Run
from vitscope.runtime import safe_files
from vitscope.runtime.errors import StorageError
from vitscope.runtime.text_layout import count_text

#: key of ``provenance.json``: seconds of measurements by kind, see `run_kinds.measurement_kind`
MEASURED_S = "measured_s"
#: a run whose journal spans more than this many times its last process's time was resumed, and says nothing of the rate
_LONGEST_SPAN = 1.2
#: over fewer steps the journal's times say too little
_FEWEST_STEPS = 5


@dataclass(frozen=True)
class Estimate:
    """Time and disk space of some trials.

    Attributes:
        seconds: Sum of what is known, of one job at a time.
        unknown_time: Number of trials of which some part is unknown.
        size: Bytes of new files, as far as known.
        unknown_size: Number of new runs whose size is unknown.
        sources: Origins of the rates.
    """

    seconds: float = 0.0
    unknown_time: int = 0
    size: float = 0.0
    unknown_size: int = 0
    sources: frozenset[str] = frozenset()

    def __add__(self, other: Estimate) -> Estimate:
        """Return the sum of both."""
        return Estimate(self.seconds + other.seconds, self.unknown_time + other.unknown_time, self.size + other.size,
                        self.unknown_size + other.unknown_size, self.sources | other.sources)  # fmt: skip


@dataclass(frozen=True)
class StepRate:
    """Time of a training.

    Attributes:
        n_steps: Number of steps of the run that it was measured in.
        seconds_per_step: Time of a step with its share of the validations.
        other_s: Time for the start and the test.
    """

    n_steps: int
    seconds_per_step: float
    other_s: float


class Rates:
    """Rates of existing runs, and those that a profile states.

    Args:
        folders: Folders of runs to read.
        profile: The profile's settings in ``conf/reproduce.yaml``: its ``rates``.
        train_images: Number of training images by data set.
    """

    def __init__(
        self, folders: Iterable[Path], profile: Mapping[str, Any], train_images: Mapping[str, int] | None = None
    ) -> None:
        self.stated: Mapping[str, Any] = profile.get("rates") or {}
        self.train_images = train_images or {}
        self._steps: dict[str, StepRate] = {}  # kind of training: of the longest run
        self._whole_s: dict[tuple[str, int], float] = {}  # kind of training and number of steps: seconds of a whole run
        self._epochs: dict[str, float] = {}  # kind of data: steps an epoch
        self._results: dict[str, float] = {}  # kind of measurement: seconds
        self._sizes: dict[str, int] = {}  # kind of files: bytes of a run
        self._parameters: dict[str, int] = {}  # model: number of parameters
        self.n_runs = 0
        self.hosts: set[str] = set()  # machines on which those runs were made
        for path in dict.fromkeys(run.path for folder in folders for run in run_search.every(folder)):
            self._read(Run(path))

    def training_seconds(self, planned: PlannedTrial) -> float | None:
        """Return how long a trial's training takes, or the rest of it; None where it is unknown."""
        cfg = planned.settings
        kind = run_kinds.training_kind(cfg)
        steps, rate = self._planned_steps(cfg), self._steps.get(kind)
        if steps is None:
            return None
        if rate is None:  # a few steps tell the time of as many alone
            return self._whole_s.get((kind, steps)) if planned.state != RESUME else None
        row = last_row(planned.run) if planned.state == RESUME and planned.run is not None else {}
        n_done = int(row["step"]) + 1 if row.get("step") is not None else 0
        return max(0, steps - n_done) * rate.seconds_per_step + rate.other_s

    def measurement_seconds(self, planned: PlannedTrial, measurement: Measurement) -> float | None:
        """Return how long a measurement takes; None where it is unknown."""
        return self._results.get(run_kinds.measurement_kind(planned.settings, measurement.analysis, measurement.node))

    def run_bytes(self, planned: PlannedTrial) -> float | None:
        """Return the size of a new run's folder: that of a run of the same kind, else of its checkpoints; None if unknown."""
        cfg = planned.settings
        if (size := self._sizes.get(run_kinds.files_kind(cfg))) is not None:
            return size
        parameters = self._parameters.get(run_kinds.model_kind(cfg)) or _count_parameters(planned)
        self._parameters[run_kinds.model_kind(cfg)] = parameters or 0
        n_files = _n_checkpoints(cfg)
        return None if not parameters or n_files is None else 4.0 * parameters * (n_files + _n_optimizer_states(cfg))

    def _planned_steps(self, cfg: Mapping[str, Any]) -> int | None:
        trainer = cfg["trainer"]
        max_steps, max_epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
        per_epoch = _steps_per_epoch(cfg, self.train_images) or self._epochs.get(run_kinds.data_kind(cfg))
        bounds = [max_steps] if max_steps > 0 else []
        if max_epochs > 0 and per_epoch is not None:
            bounds.append(math.ceil(max_epochs * per_epoch))
        return min(bounds) if bounds else None

    def _read(self, run: Run) -> None:
        try:
            facts = run.provenance()
            cfg = yaml.load(safe_files.read_text(run.path / "config.yaml", safe_files.LARGEST), _LOADER)
            model, is_finished = run_kinds.model_kind(cfg), facts.get("status") == "finished"
        except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            return  # a damaged folder, or no training of vitscope
        if isinstance(count := (facts.get("model") or {}).get("parameters"), int):
            self._parameters[model] = count
        for name, seconds in (facts.get(MEASURED_S) or {}).items():
            self._results[name] = float(seconds)
        if is_finished:
            self._read_training(run, facts, cfg)

    def _read_training(self, run: Run, facts: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
        row, wall = last_row(run), facts.get("wall_s")
        if not isinstance(wall, int | float) or not row.get("step") or cfg.get("analysis"):
            return  # the time of its analyses is within
        self.n_runs += 1
        self.hosts |= {str(facts["host"])} if facts.get("host") else set()
        if facts.get("slim"):  # as a reproduction leaves it
            self._sizes[run_kinds.files_kind(cfg)] = _bytes_below(run.path)
        steps = int(row["step"]) + 1
        n_epochs = int(row.get("epoch") or 0) + 1
        if n_epochs == cfg["trainer"].get("max_epochs") and (cfg["trainer"].get("max_steps") or -1) < 0:  # whole epochs
            self._epochs[run_kinds.data_kind(cfg)] = steps / n_epochs
        first = _first_row(run)
        span, kind = row.get("time", 0.0) - first.get("time", 0.0), run_kinds.training_kind(cfg)
        if span > _LONGEST_SPAN * wall + 60 or steps < getattr(self._steps.get(kind), "n_steps", 0):
            return
        self._whole_s[kind, steps] = float(wall)
        n_timed = steps - 1 - int(first.get("step") or 0)
        if n_timed >= _FEWEST_STEPS:
            per_step = span / n_timed
            self._steps[kind] = StepRate(steps, per_step, max(0.0, wall - per_step * steps))


def estimate(trials: Sequence[PlannedTrial], rates: Rates) -> list[Estimate]:
    """Return the estimate of each trial in the order of their start: what trials share is counted with the first of them."""
    trained: set[str] = set()
    measured: set[tuple[str, str]] = set()
    estimates = []
    for planned in trials:
        is_new = planned.state not in (EXISTS, MEASURE) and planned.identity not in trained
        trained.add(planned.identity)
        missing = [m for m in planned.missing if (planned.identity, m.key) not in measured]
        measured.update((planned.identity, m.key) for m in missing)
        estimates.append(_estimate(planned, rates, is_new, missing))
    return estimates


def _estimate(planned: PlannedTrial, rates: Rates, is_new: bool, missing: Sequence[Measurement]) -> Estimate:
    training = [rates.training_seconds(planned)] if is_new else []
    parts = training + [rates.measurement_seconds(planned, m) for m in missing]
    times = [seconds for seconds in parts if seconds is not None]
    is_unknown = len(times) < len(parts)
    machines = f" on {', '.join(sorted(rates.hosts))}" if rates.hosts else ""
    sources = {f"{count_text(rates.n_runs, 'finished run')}{machines}"} if times else set()
    stated = rates.stated.get("seconds_per_training")  # with the measurements of all trials
    if is_unknown and stated is not None and planned.state == TRAIN and training in ([], [None]):
        times, is_unknown, sources = [float(stated)] if is_new else [], False, {str(rates.stated["source"])}
    size = rates.run_bytes(planned) if is_new else 0.0
    return Estimate(sum(times), int(is_unknown), size or 0.0, int(size is None), frozenset(sources))


def _steps_per_epoch(cfg: Mapping[str, Any], train_images: Mapping[str, int]) -> float | None:
    """Return the steps of an epoch by the size of the data set, None where the size or the number of devices is unknown."""
    data, trainer = cfg["data"], cfg["trainer"]
    limit, devices = trainer.get("limit_train_batches", 1.0), trainer.get("devices", 1)
    n_images = train_images.get(str(data.get("name")))
    if n_images is None or devices not in (1, "1") or trainer.get("num_nodes", 1) != 1:
        return float(limit) if isinstance(limit, int) and limit >= 1 else None
    share = n_images * float(data.get("fraction") or 1.0) / int(data["batch_size"])
    n_batches = math.floor(share) if data.get("drop_last") else math.ceil(share)
    n_batches = min(n_batches, limit) if isinstance(limit, int) else int(n_batches * float(limit))  # as Lightning does
    return math.ceil(n_batches / int(trainer.get("accumulate_grad_batches") or 1))


def _n_checkpoints(cfg: Mapping[str, Any]) -> int | None:
    """Return the number of checkpoint files of a finished run, None where the snapshots are not a list of epochs."""
    node = (cfg.get("callbacks") or {}).get("checkpoint") or {}
    snapshots = node.get("snapshots") or []
    if not isinstance(snapshots, list):
        return None
    epochs = cfg["trainer"].get("max_epochs") or -1
    return 2 + bool(node.get("init", True)) + sum(epochs < 1 or epoch < epochs for epoch in snapshots)


def _n_optimizer_states(cfg: Mapping[str, Any]) -> int:
    """Return the number of values an optimizer keeps for each parameter: in ``last.ckpt`` alone once a run is finished."""
    return 1 if str(cfg["optimizer"].get("_target_")).endswith("SGD") else 2


def _count_parameters(planned: PlannedTrial) -> int | None:
    import torch  # a plan whose runs all have a size does not need it

    from vitscope.config import factories

    try:
        with torch.device("meta"):
            model = factories.model(OmegaConf.create(dict(planned.settings)))
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:  # a model that cannot be built without weights has no computed size
        return None


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _first_row(run: Run) -> dict[str, Any]:
    try:
        with run.journal.open() as file:
            return _row(file.readline())
    except OSError:
        return {}


def last_row(run: Run) -> dict[str, Any]:
    """Return the last row of a training step or a validation, {} without one."""
    try:
        with run.journal.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 18)))
            rows = [_row(line) for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return {}
    trained = [row for row in rows if any(key.startswith(("train/", "val/")) for key in row)]
    return trained[-1] if trained else {}


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
