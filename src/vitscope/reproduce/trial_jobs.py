"""Trials of a reproduction as jobs of the sweep's scheduler: order, outcome files, and what the run folders hold already."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitscope.config import loading
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.planned_work import PlannedTrial
from vitscope.runtime import atomic_write
from vitscope.sweep import job_scheduler, trial_leases, trial_process
from vitscope.sweep.trial_leases import TrialLeases
from vitscope.sweep.trial_process import OUTPUT, JobProcess, Slot

#: folder of the jobs' output below the folder of runs
FOLDER = "jobs"
OUTCOME = "outcome.json"
#: seconds between two updates of what is shown
UPDATE_S = 1.0


@dataclass
class TrialJob:
    """A trial as a job.

    Attributes:
        planned: The trial and what exists of it.
        folder: Folder of its output and outcome.
        slot: Name of the slot in which it runs or ran.
        started: ``time.monotonic()`` at its start, later by what it waited in a queue of SLURM.
        seconds: Duration without that wait; 0 before its end.
        process: The job's process while it runs.
        outcome: What became of it; None before its end.
    """

    planned: PlannedTrial
    folder: Path
    slot: str = ""
    started: float = 0.0
    seconds: float = 0.0
    process: JobProcess | None = field(default=None, repr=False)
    outcome: Outcome | None = None

    @property
    def trial(self) -> Trial:
        """The trial."""
        return self.planned.trial

    @property
    def is_queued(self) -> bool:
        """Whether its process waits for a node of SLURM."""
        return bool(getattr(self.process, "is_queued", False))

    @property
    def output(self) -> Path:
        """The file of what the job's process prints."""
        return self.folder / OUTPUT


#: starts a job in a slot
Launcher = Callable[[TrialJob, Slot], JobProcess]
#: called about every second, and with a job that has started or ended
Show = Callable[["TrialJobs", "TrialJob | None"], None]


class TrialJobs:
    """Supplies trials to `job_scheduler.run_jobs`; two that share a training never run at the same time, in any invocation.

    Args:
        planned: Trials in the order in which to start them.
        root: The folder of runs.
        launch: Starts a job.
        show: Function that shows progress.
    """

    def __init__(
        self, planned: Sequence[PlannedTrial], root: Path, launch: Launcher, show: Show = lambda jobs, changed: None
    ) -> None:
        self.jobs = [TrialJob(p, root.absolute() / FOLDER / folder_name(p.trial)) for p in planned]
        self.show = show
        self._launch = launch
        self._waiting = list(self.jobs)
        self._ended_elsewhere: list[TrialJob] = []
        self._leases = TrialLeases(root.absolute() / FOLDER)
        self._updated = 0.0

    def running(self) -> list[TrialJob]:
        """Return the jobs that run."""
        return [job for job in self.jobs if job.process is not None]

    def next_job(self) -> TrialJob | None:
        """Return the next job whose training no running job performs, here or in another invocation; None for none now.

        A trial that another invocation has ended meanwhile is not performed again: its outcome counts here too.
        """
        self._leases.begin()
        busy = {job.planned.identity for job in self.running()}
        for job in list(self._waiting):
            if job.planned.identity in busy or not self._leases.acquire(job.planned.identity):
                continue
            if self._leases.is_new(job.folder / OUTCOME) and (outcome := read_outcome(job.folder)) is not None:
                self._leases.release(job.planned.identity)
                self._waiting.remove(job)
                job.outcome = outcome
                self._ended_elsewhere.append(job)
                self.show(self, job)
            elif self._has_living_child(job):
                self._leases.release(job.planned.identity, again_later=True)
            else:
                self._waiting.remove(job)
                return job
        return None

    def _has_living_child(self, job: TrialJob) -> bool:
        """Tell whether a process that an invocation left behind still works on the training of a job."""
        folders = [other.folder for other in self.jobs if other.planned.identity == job.planned.identity]
        return any(trial_leases.is_in_use(folder) for folder in folders)

    def ended_elsewhere(self) -> list[TrialJob]:
        """Return the jobs that another invocation has ended since the last call."""
        jobs, self._ended_elsewhere = self._ended_elsewhere, []
        return jobs

    def waits_for_others(self) -> bool:
        """Tell whether another invocation performs a training of these trials."""
        return bool(self._waiting)

    def close(self) -> None:
        """Give the leases back."""
        self._leases.close()

    def start(self, job: TrialJob, slot: Slot) -> JobProcess:
        """Start a job."""
        (job.folder / OUTCOME).unlink(missing_ok=True)
        job.process = process = self._launch(job, slot)
        job.slot, job.started = slot.name, time.monotonic()
        self.show(self, job)
        return process

    def end(self, job: TrialJob, process: JobProcess, stopping: bool) -> None:
        """Take note of how a job ended."""
        job.process, job.seconds = None, time.monotonic() - job.started
        try:
            self._note_outcome(job, process, stopping)
        finally:
            self._leases.release(job.planned.identity)

    def _note_outcome(self, job: TrialJob, process: JobProcess, stopping: bool) -> None:
        if stopping:
            return
        job.outcome = read_outcome(job.folder)
        if job.outcome is None:
            code = trial_process.exit_code(process)
            reason = trial_process.last_error(job.output) or "no message"
            job.outcome = Outcome(None, (f"{job.trial.name} (its process ended with {code}: {reason}; {job.output})",))
            write_outcome(job.outcome, job.folder)  # for other invocations
        self.show(self, job)

    def watch(self) -> None:
        """Update what is shown."""
        now = time.monotonic()
        if now - self._updated >= UPDATE_S:
            for job in self.running():
                if job.is_queued:  # time in a queue says nothing of how long others will take
                    job.started += min(now - job.started, now - self._updated)
            self._updated = now
            self.show(self, None)


def outcomes(jobs: TrialJobs, slots: Sequence[Slot]) -> Iterator[tuple[Trial, Outcome]]:
    """Run all jobs; yield each trial with what became of it, as soon as it has ended.

    Raises:
        Interrupted: A stop was asked for; the trials that ran have saved their checkpoints.
    """
    try:
        for job in job_scheduler.run_jobs(jobs, slots):
            assert job.outcome is not None
            yield job.trial, job.outcome
    finally:
        jobs.close()


def folder_name(trial: Trial) -> str:
    """Return the name of a trial's folder of output: model and seed, and a hash of all settings and moments."""
    settings = dict(override.lstrip("+").split("=", 1) for override in trial.overrides)
    parts = [settings.get("experiment", ""), settings.get("model", ""), f"seed{settings.get('seed', 0)}"]
    return "-".join([*filter(None, parts), loading.digest([trial.overrides, trial.tags], 6)])


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write what became of a trial into its job's folder."""
    content = {
        "run": None if outcome.run is None else str(outcome.run),
        "problems": outcome.problems,
        "results": outcome.results,
    }
    atomic_write.write_atomically(folder / OUTCOME, json.dumps(content, indent=1).encode())


def read_outcome(folder: Path) -> Outcome | None:
    """Return what a job wrote with `write_outcome`, None where it has not."""
    try:
        content = json.loads((folder / OUTCOME).read_text())
    except (OSError, ValueError):
        return None
    run = content["run"]
    return Outcome(None if run is None else Path(run), tuple(content["problems"]), tuple(content["results"]))
