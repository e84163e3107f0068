"""``make sweep-local``: a sweep's trials on this machine, one process each, with a journal that goes on."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.runs import metrics_log
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, StorageError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import early_termination, search_algorithms, sweep_file, trial_process
from vitscope.sweep.sweep_file import Sweep
from vitscope.sweep.trial_process import Slot

JOURNAL = "sweep.jsonl"
OUTPUT = "output.txt"
#: seconds between two looks into the running trials' journals
WATCH = 1.0
#: states in which a trial needs nothing more
COMPLETE = ("finished", "stopped early")


@dataclass
class Trial:
    """One trial and where it stands.

    ``state`` is ``waiting``, ``running``, ``finished``, ``stopped early``, ``failed`` or ``stopped``.
    """

    index: int
    params: dict[str, Any]
    folder: Path
    state: str = "waiting"
    exit_code: int | None = None
    slot: Slot | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wall_s: float = 0.0
    rung: int | None = None
    history: list[float] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """What the trial's output says of its failure."""
        return trial_process.last_error(self.folder / OUTPUT)


class LocalSweep:
    """A sweep's folder, its trials, and the loop over them.

    Args:
        sweep: what to run.
        root: the folder of sweeps; this one takes ``<root>/<file>-<hash>``.
        slots: where trials run.
        limit: at most the first so many trials.
        show: called with this object about every second and whenever something changed.

    Raises:
        StorageError: the folder cannot be written.
        ConfigError: another process runs this sweep.
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
        self._lock = _lock(self.folder)
        self._watched = 0.0
        earlier_trials, early = _past(self.folder / JOURNAL)
        self._early = early
        self.search = search_algorithms.start(sweep, limit, earlier_trials)

    def run(self) -> int:
        """Run what is not complete.

        Returns:
            0 if every trial is finished (or was stopped early, as the file asks); else the code of the first that is not.

        Raises:
            Interrupted: asked to stop; the children have saved and ended.
        """
        try:
            while self._step():
                time.sleep(0.05)
        finally:
            running = [trial for trial in self.trials if trial.process is not None]
            trial_process.stop(
                [trial.process for trial in running if trial.process], stop_flag.requested() or signal.SIGTERM
            )
            for trial in running:
                self._ended(trial, stopping=True)
            self._lock.close()
        return next((trial.exit_code or 1 for trial in self.trials if trial.state not in COMPLETE), 0)

    def failed(self) -> list[Trial]:
        """Return the trials that failed, by number."""
        return [trial for trial in self.trials if trial.state == "failed"]

    def _step(self) -> bool:
        """Start, watch and finish trials once; return whether there is more to do."""
        if (signum := stop_flag.requested()) is not None:
            raise Interrupted(signum)
        busy = {trial.slot.name for trial in self.trials if trial.process is not None and trial.slot}
        for slot in (slot for slot in self.slots if slot.name not in busy):
            if (trial := self._next()) is None:
                break
            self._start(trial, slot)
        running = [trial for trial in self.trials if trial.process is not None]
        for trial in running:
            if trial.process is not None and trial.process.poll() is not None:
                self._ended(trial)
        self._watch()
        return bool(running)  # none although every slot was free: nothing is left to start

    def _next(self) -> Trial | None:
        """Return the next trial that is not complete; those that are go straight into the list."""
        while (params := self.search.ask(len(self.trials))) is not None:
            index = len(self.trials)
            trial = Trial(index, params, self.folder / sweep_file.folder_name(index, params))
            self.trials.append(trial)
            if trial_process.outcome(trial.folder).finished:
                trial.state, trial.exit_code = "finished", 0
            elif index in self._early:
                trial.state, trial.exit_code = "stopped early", 0
            if trial.state == "waiting":
                return trial
            self._read(trial)
            self.search.tell(index, params, self._value(trial))
            self.show(self, trial)
        return None

    def _start(self, trial: Trial, slot: Slot) -> None:
        command = trial_process.training(
            [sys.executable, self.sweep.program], sweep_file.arguments(trial.params), trial.folder
        )
        env = trial_process.environment(slot, WANDB_RUN_GROUP=self.sweep.name)
        self._note(event="start", trial=trial.index, params=trial.params, slot=slot.name)
        trial.process = trial_process.start(command, env, trial.folder / OUTPUT)
        trial.state, trial.slot, trial.started = "running", slot, time.monotonic()
        self.show(self, trial)

    def _ended(self, trial: Trial, stopping: bool = False) -> None:
        assert trial.process is not None
        code = trial_process.exit_code(trial.process)
        assert code is not None
        trial.process, trial.wall_s = None, time.monotonic() - trial.started
        outcome = trial_process.outcome(trial.folder)
        if code == 0 and outcome.finished:
            trial.state, trial.exit_code = "finished", 0
        elif trial.rung is not None and code in (0, 143):
            trial.state, trial.exit_code = "stopped early", 0
        else:
            trial.state = "stopped" if stopping and code in (130, 143) else "failed"
            trial.exit_code = code or outcome.exit_code or 1  # the process said 0, its folder does not
        self._read(trial)
        self._note(event="end", trial=trial.index, state=trial.state, exit_code=trial.exit_code, wall_s=round(trial.wall_s, 3),
                   value=self._value(trial), rung=trial.rung)  # fmt: skip
        self.search.tell(trial.index, trial.params, self._value(trial) if trial.state in COMPLETE else None)
        self.show(self, trial)

    def _watch(self) -> None:
        """Every now and then: read the running trials' journals and end those that have fallen behind."""
        now = time.monotonic()
        if now - self._watched < WATCH:
            return
        self._watched = now
        for trial in self.trials:
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
        by_step = {row.get("step"): row[self.metric] for row in rows if row.get(self.metric) is not None}
        trial.history = [float(value) for value in by_step.values() if math.isfinite(value)]
        trial.rows = {key: value for row in rows for key, value in row.items() if value is not None}

    def _value(self, trial: Trial) -> float | None:
        return trial.history[-1] if trial.history else None

    def _note(self, **facts: Any) -> None:
        line = json.dumps({"time": time.time(), **facts}) + "\n"
        with (self.folder / JOURNAL).open("a") as file:
            file.write(line)


def _lock(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError("paths.runs", folder, f"not writable ({error.strerror})", "choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError("SWEEP", folder.name, "another process runs it", "wait for it, or stop it") from None
    return file


def _past(path: Path) -> tuple[Mapping[int, dict[str, Any]], set[int]]:
    """Return what an earlier invocation proposed, and which trials it stopped early."""
    rows = metrics_log.read(path)
    earlier_trials = {int(row["trial"]): dict(row["params"]) for row in rows if row.get("event") == "start"}
    ends = {int(row["trial"]): row.get("state") for row in rows if row.get("event") == "end"}
    return earlier_trials, {index for index, state in ends.items() if state == "stopped early"}
