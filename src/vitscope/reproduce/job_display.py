"""Show how far a reproduction is: a bar with the time left and the running jobs on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitscope.reproduce.cost_estimates import last_row
from vitscope.reproduce.plan import Trial
from vitscope.reproduce.planned_work import EXISTS, MEASURE, RESUME, TRAIN
from vitscope.reproduce.trial_jobs import FOLDER, TrialJob, TrialJobs
from vitscope.runs import run_search
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import StorageError
from vitscope.runtime.live_display import LiveDisplay
from vitscope.runtime.text_layout import duration_text
from vitscope.sweep.job_scheduler import side_by_side_seconds
from vitscope.sweep.progress_table import WIDE, short_path
from vitscope.sweep.trial_process import OUTPUT

_logger = logging.getLogger(__name__)

#: seconds between two plain lines
PLAIN_INTERVAL = 60.0


class TimeLeft:
    """The time left of a reproduction, from estimates of its trials and the durations of the jobs that have ended.

    Args:
        seconds: Estimate of each trial; a trial without one takes as long as the mean of those of its state that have
            ended without a problem.
        n_slots: Number of jobs side by side.
    """

    def __init__(self, seconds: Mapping[Trial, float], n_slots: int) -> None:
        self.seconds, self.n_slots = seconds, n_slots

    def text(self, jobs: Sequence[TrialJob]) -> str:
        """Return the time left in words, ``time left unknown`` before there is anything to go by."""
        seconds = self.estimate(jobs)
        return "time left unknown" if seconds is None else f"about {duration_text(max(seconds, 1.0))} left"

    def estimate(self, jobs: Sequence[TrialJob]) -> float | None:
        """Return the time left in seconds, None before there is anything to go by, and where a job takes longer than expected."""
        means = {state: _mean([job.seconds for job in jobs if _is_example(job) and job.planned.state == state])
                 for state in (EXISTS, MEASURE, RESUME, TRAIN)}  # fmt: skip
        rests = []
        for job in (job for job in jobs if job.outcome is None):
            expected = self.seconds.get(job.trial, means[job.planned.state])
            if expected is None and job.planned.state == EXISTS:
                expected = 1.0  # its results are read
            elapsed = time.monotonic() - job.started if job.process is not None else 0.0
            if expected is None or elapsed > expected:
                return None
            rests.append(expected - elapsed)
        return side_by_side_seconds(rests, self.n_slots)


def _is_example(job: TrialJob) -> bool:
    """Whether a job has ended without a problem, so that others of its state take about as long."""
    return job.outcome is not None and not job.outcome.problems


class JobDisplay(LiveDisplay):
    """Shows jobs; use it as a context, and as the ``show`` of a `TrialJobs`.

    Args:
        root: The folder of runs.
        time_left: Estimates the time left.
        console: Where to draw; standard error by default.
    """

    def __init__(self, root: Path, time_left: TimeLeft, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=True))
        self._root, self._time_left = root, time_left
        self._started = self._last_line = time.monotonic()
        self._runs: dict[str, Run] = {}
        self._searched: dict[str, float] = {}

    def __call__(self, jobs: TrialJobs, changed: TrialJob | None) -> None:
        """Draw the bar again, and log a line for a job that has ended; without a terminal also now and then one on the others."""
        if changed is not None and changed.outcome is not None:
            state = "failed" if changed.outcome.problems else "done"
            _logger.info(f"[{self.summary(jobs)}] {state}: {_short_name(changed, jobs.jobs)}")
            self._last_line = time.monotonic()
        if self._live:
            self._live.update(self.picture(jobs), refresh=True)
        elif jobs.running() and time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            texts = [f"{job.slot}: {_short_name(job, jobs.jobs)}, {self._position(job)}" for job in jobs.running()]
            _logger.info(f"[{self.summary(jobs)}] {'; '.join(texts)}")
        elif changed is not None and changed.process is not None and not self._live:
            _logger.info(f"{changed.slot}: {_short_name(changed, jobs.jobs)}, output {short_path(changed.output)}")

    def summary(self, jobs: TrialJobs) -> str:
        """Return how many jobs have ended, the time since the start and the time left."""
        n_ended = sum(job.outcome is not None for job in jobs.jobs)
        elapsed = duration_text(round(time.monotonic() - self._started))
        time_left = f", {self._time_left.text(jobs.jobs)}" if n_ended < len(jobs.jobs) else ""
        return f"{n_ended}/{len(jobs.jobs)}, {elapsed}{time_left}"

    def picture(self, jobs: TrialJobs) -> RenderableType:
        """Return the bar and a row for each running job."""
        n_ended = sum(job.outcome is not None for job in jobs.jobs)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(len(jobs.jobs), n_ended, width=min(40, self._console.width // 3)), self.summary(jobs))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        names = ["on", "run", "position", "time", "output"]
        shown_names = [name for name in names if name != "run" or self._console.width >= WIDE]
        for name in shown_names:
            table.add_column(
                name, no_wrap=name != "run", justify="right" if name == "time" else "left", overflow="fold"
            )
        for job in jobs.running():
            elapsed = duration_text(round(time.monotonic() - job.started))
            cells = dict(
                zip(names, (job.slot, _short_name(job, jobs.jobs), self._position(job), elapsed, job.folder.name))
            )
            table.add_row(*(cells[name] for name in shown_names))
        caption = Text(f"output: {short_path(self._root.absolute() / FOLDER)}/<output>/{OUTPUT}")
        return Group(bar, table, caption) if jobs.running() else Group(bar)

    def _position(self, job: TrialJob) -> str:
        """Return the epoch and step of a job's training, or what it does otherwise."""
        if job.is_queued:
            return "queued"
        run = self._run_of(job)
        if run is None:
            return "starting" if job.planned.run is None else "measuring"
        try:
            is_training = run.provenance().get("status") == "running"
        except StorageError:
            is_training = False
        if not is_training:
            return "measuring"
        last = last_row(run)
        return f"epoch {last['epoch']}, step {last['step']}" if {"epoch", "step"} <= set(last) else "training"

    def _run_of(self, job: TrialJob) -> Run | None:
        """Return the folder of a job's run, looked for now and then until there is one."""
        identity, now = job.planned.identity, time.monotonic()
        if identity not in self._runs and now - self._searched.get(identity, -1e9) > 5:
            self._searched[identity] = now
            for run in run_search.every(self._root):
                try:
                    if run.provenance().get("config_hash") == identity:
                        self._runs[identity] = run
                except StorageError:  # a damaged folder
                    continue
        return self._runs.get(identity)


def _short_name(job: TrialJob, jobs: Sequence[TrialJob]) -> str:
    """Return what tells a trial from the others: experiment, model, seed, and settings that not all of them have."""
    shared = set.intersection(*(set(other.trial.overrides) for other in jobs)) if len(jobs) > 1 else set()
    always, never = ("experiment=", "model=", "seed="), ("profile=", "logger=", "callbacks.checkpoint.snapshots=")
    overrides = [
        o for o in job.trial.overrides if o.startswith(always) or (o not in shared and not o.startswith(never))
    ]
    return " ".join(overrides) or job.trial.name


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
