"""``make sweep-local``: a sweep's trials on this machine, one process each, with a journal that a later command continues."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.runs import metrics_log, run_lock
from vitscope.sweep import early_termination, job_scheduler, search_algorithms, sweep_file, trial_leases, trial_process
from vitscope.sweep.sweep_file import Sweep
from vitscope.sweep.trial_leases import TrialLeases
from vitscope.sweep.trial_process import OUTPUT, ChildProcess, JobProcess, Slot

JOURNAL = "sweep.jsonl"
#: seconds between two looks into the running trials' journals
WATCH = 1.0
#: states in which a trial needs nothing more
COMPLETE = ("finished", "stopped early")


@dataclass
class Trial:
    """One trial and where it stands.

    ``state`` is ``waiting``, ``running``, ``elsewhere`` (in another invocation), ``finished``, ``stopped early``, ``failed`` or
    ``stopped``.
    """

    index: int
    params: dict[str, Any]
    folder: Path
    state: str = "waiting"
    exit_code: int | None = None
    slot: Slot | None = None
    process: ChildProcess | None = None
    started: float = 0.0
    wall_s: float = 0.0
    rung: int | None = None
    history: list[float] = field(default_factory=list)
    has_diverged: bool = False
    rows: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The file of what the trial's process prints."""
        return self.folder / OUTPUT

    @property
    def why(self) -> str:
        """Reason of the trial's failure, from its output."""
        return trial_process.last_error(self.output)

    @property
    def value(self) -> float | None:
        """The last value of the sweep's metric; None before the first, and where the last one is not finite."""
        return self.history[-1] if self.history and not self.has_diverged else None

    @property
    def seconds(self) -> float:
        """Duration of the running process, else of all processes that have trained this trial."""
        return time.monotonic() - self.started if self.process is not None else self.wall_s


class LocalSweep:
    """A sweep's folder, its trials, and the loop over them.

    Args:
        sweep: The sweep to run.
        root: The folder of sweeps; this one takes ``<root>/<file>-<hash>``.
        slots: GPUs or shares of the CPU's cores, each of which runs one trial at a time.
        limit: Largest number of trials to run, the first ones.
        show: A function that is called with this object about every second and whenever something changed.

    Raises:
        StorageError: The folder cannot be written.
        ConfigError: A search that has no end, or Optuna is not installed.
    """

    def __init__(
        self,
        sweep: Sweep,
        root: Path,
        slots: Sequence[Slot],
        *,
        limit: int | None = None,
        show: Callable[[LocalSweep, Trial | None], None] = lambda sweep, changed: None,
    ) -> None:
        self.sweep, self.folder, self.slots = sweep, (root / sweep.name).absolute(), list(slots)
        self.limit, self.show = limit, show
        self.trials: list[Trial] = []
        self.metric, self.larger = sweep.metric
        terminate = sweep.content.get("early_terminate")
        self.rungs = early_termination.rungs(terminate) if terminate else []
        self.eta = float(terminate.get("eta", 3)) if terminate else 3.0
        self._leases = TrialLeases(self.folder)
        self._leases.begin()
        self._elsewhere: list[Trial] = []
        self._ended_elsewhere: list[Trial] = []
        self._watched = 0.0
        rows = metrics_log.read(self.folder / JOURNAL)
        self._n_earlier_rows, self._journal_size = len(rows), -1
        self._new_ends: Mapping[int, Mapping[str, Any]] = {}
        earlier_trials, self._early, self._earlier_seconds = _past(rows)
        self.search = search_algorithms.start(sweep, limit, earlier_trials, self.folder)

    def run(self) -> int:
        """Run what is not complete.

        Returns:
            0 if every trial is finished (or was stopped early, as the file asks); else the code of the first that is not.

        Raises:
            Interrupted: Asked to stop; the children have saved and ended.
        """
        try:
            for _ in job_scheduler.run_jobs(self, self.slots):
                pass
        finally:
            self._leases.close()
        return next((trial.exit_code or 1 for trial in self.trials if trial.state not in COMPLETE), 0)

    def failed(self) -> list[Trial]:
        """Return the trials that failed, by number."""
        return [trial for trial in self.trials if trial.state == "failed"]

    def ranking(self) -> list[Trial]:
        """Return the complete trials that have a value of the metric, the best last value first; equal ones by number."""
        sign = -1 if self.larger else 1
        return sorted(
            (trial for trial in self.trials if trial.value is not None and trial.state in COMPLETE),
            key=lambda trial: (sign * (trial.value or 0.0), trial.index),
        )

    def next_job(self) -> Trial | None:
        """Return the next trial that is not complete and that no other invocation performs.

        Those that are complete go straight into the list; those of other invocations are looked at again until they have ended.
        """
        while (params := self.search.ask(len(self.trials))) is not None:
            index = len(self.trials)
            trial = Trial(index, params, self.folder / sweep_file.folder_name(index, params))
            trial.wall_s = self._earlier_seconds.get(index, 0.0)
            self.trials.append(trial)
            if index in self._early:
                trial.state, trial.exit_code = "stopped early", 0
            if self._settled(trial):
                self._noted(trial)
            elif self._taken(trial):
                return trial
            elif trial.state == "waiting":
                trial.state = "elsewhere"
                self._elsewhere.append(trial)
                self.show(self, trial)
            else:
                self._noted(trial)
        for trial in list(self._elsewhere):
            if self._taken(trial):
                self._elsewhere.remove(trial)
                trial.state = "waiting"
                return trial
            if trial.state != "elsewhere":
                self._elsewhere.remove(trial)
                self._ended_elsewhere.append(trial)
                self._noted(trial)
        return None

    def ended_elsewhere(self) -> list[Trial]:
        """Return the trials that another invocation has ended since the last call."""
        trials, self._ended_elsewhere = self._ended_elsewhere, []
        return trials

    def waits_for_others(self) -> bool:
        """Tell whether another invocation performs a trial."""
        return bool(self._elsewhere)

    def _taken(self, trial: Trial) -> bool:
        """Take a trial's lease; return whether it is to be performed here. One that has ended elsewhere has its state then."""
        name = trial.folder.name
        if not self._leases.acquire(name):
            return False
        if self._settled(trial):
            self._leases.release(name)
            return False
        if trial_leases.is_in_use(trial.folder):  # the process of an invocation that was killed is still saving
            self._leases.release(name, again_later=True)
            return False
        return True

    def _settled(self, trial: Trial) -> bool:
        """Tell whether a trial needs no process of this invocation; it has its state then."""
        if trial_process.outcome(trial.folder).finished:
            trial.state, trial.exit_code = "finished", 0
        else:
            row = self._ends_elsewhere().get(trial.index, {})
            if row.get("state") in ("stopped early", "failed"):
                trial.state, trial.exit_code = row["state"], row.get("exit_code")
        return trial.state in (*COMPLETE, "failed")

    def _ends_elsewhere(self) -> Mapping[int, Mapping[str, Any]]:
        """Return the last row of each trial that has ended since this invocation began."""
        path = self.folder / JOURNAL
        size = path.stat().st_size if path.exists() else 0
        if size != self._journal_size:
            self._journal_size = size
            rows = metrics_log.read(path)[self._n_earlier_rows :]
            self._new_ends = {int(row["trial"]): row for row in rows if row.get("event") == "end"}
        return self._new_ends

    def _noted(self, trial: Trial) -> None:
        """Read the values of a trial that was not performed here."""
        self._read(trial)
        if trial.state in COMPLETE:  # one that failed is tried again by the next invocation
            self.search.tell(trial.index, trial.params, trial.value)
        self.show(self, trial)

    def start(self, trial: Trial, slot: Slot) -> JobProcess:
        """Start a trial, or resume the one that was begun in its folder."""
        command = trial_process.training(program_command(self.sweep), sweep_file.arguments(trial.params), trial.folder)
        env = trial_process.environment(slot, WANDB_RUN_GROUP=self.sweep.name)
        self._note(event="start", trial=trial.index, params=trial.params, slot=slot.name)
        trial.process = process = trial_process.start(command, env, trial.output)
        trial.state, trial.slot, trial.started = "running", slot, time.monotonic()
        self.show(self, trial)
        return process

    def end(self, trial: Trial, process: JobProcess, stopping: bool) -> None:
        """Take note of how a trial ended: what its folder says counts."""
        code = trial_process.exit_code(process)
        assert code is not None
        seconds = time.monotonic() - trial.started
        trial.process, trial.wall_s = None, trial.wall_s + seconds
        outcome = trial_process.outcome(trial.folder)
        if code == 0 and outcome.finished:
            trial.state, trial.exit_code = "finished", 0
        elif trial.rung is not None and code in (0, 143):
            trial.state, trial.exit_code = "stopped early", 0
        else:
            trial.state = "stopped" if stopping and code in (130, 143) else "failed"
            trial.exit_code = code or outcome.exit_code or 1  # the process said 0, its folder does not
        self._read(trial)
        self._note(event="end", trial=trial.index, state=trial.state, exit_code=trial.exit_code, wall_s=round(seconds, 3),
                   value=trial.value, rung=trial.rung)  # fmt: skip
        self._leases.release(trial.folder.name)
        if trial.state in COMPLETE:
            self.search.tell(trial.index, trial.params, trial.value)
        self.show(self, trial)

    def watch(self) -> None:
        """Every now and then: read the running trials' journals and end those that have fallen behind."""
        now = time.monotonic()
        if now - self._watched < WATCH:
            return
        self._watched = now
        for trial in self.trials:
            if trial.state == "elsewhere":  # its values count for those that run here
                self._read(trial)
            if trial.process is None:
                continue
            self._read(trial)
            if self.rungs and trial.rung is None:
                others = [other.history for other in self.trials if other is not trial and other.history]
                trial.rung = early_termination.hopeless(trial.history, others, self.rungs, self.eta, self.larger)
                if trial.rung is not None:
                    trial.process.send_signal(signal.SIGTERM)
        self.show(self, None)

    def _read(self, trial: Trial) -> None:
        rows = metrics_log.read(trial.folder / metrics_log.FILE)
        by_step = {row.get("step"): row[self.metric] for row in rows if self.metric in row}
        finite = [value is not None and math.isfinite(value) for value in by_step.values()]
        trial.history = [float(value) for value, is_finite in zip(by_step.values(), finite) if is_finite]
        trial.has_diverged = not all(finite[-1:])
        trial.rows = metrics_log.last_values_of(rows)

    def _note(self, **facts: Any) -> None:
        path, line = self.folder / JOURNAL, json.dumps({"time": time.time(), **facts}) + "\n"
        with run_lock.exclusive(self.folder):
            start = "\n" if metrics_log.is_torn(path) else ""  # the row that was cut short stays apart
            with path.open("a") as file:
                file.write(start + line)


def program_command(sweep: Sweep) -> list[str]:
    """Return the command of a sweep's program: its file, or ``train.py`` wherever the package has it."""
    path = Path(sweep.program)
    return [sys.executable, sweep.program] if path.is_file() else trial_process.train_program()


def _past(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[int, dict[str, Any]], set[int], Mapping[int, float]]:
    """Return what earlier invocations proposed, which trials they stopped early, and the seconds spent on each trial."""
    earlier_trials = {int(row["trial"]): dict(row["params"]) for row in rows if row.get("event") == "start"}
    ends = [row for row in rows if row.get("event") == "end"]
    states = {int(row["trial"]): row.get("state") for row in ends}
    seconds: dict[int, float] = {}
    for row in ends:
        seconds[int(row["trial"])] = seconds.get(int(row["trial"]), 0.0) + float(row.get("wall_s") or 0.0)
    return earlier_trials, {index for index, state in states.items() if state == "stopped early"}, seconds
