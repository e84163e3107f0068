"""Perform the trials of a reproduction as jobs side by side: forked processes on this machine, or jobs of SLURM."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscope.cli import reproduce_job
from vitscope.reproduce import cost_estimates, job_display, planned_work, slurm_job, trial_jobs, work_listing
from vitscope.reproduce.cost_estimates import Rates
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.trial_jobs import Launcher, TrialJob
from vitscope.sweep import trial_process
from vitscope.sweep.forked_job import ForkedJob
from vitscope.sweep.trial_process import JobProcess, Slot

_logger = logging.getLogger(__name__)


def work(
    gpus: str | None,
    jobs: int | None,
    *,
    launcher: str,
    slurm: Mapping[str, Any],
    rates: Callable[[], Rates],
    checks: bool,
) -> Callable[[Sequence[Trial], Path], Iterator[tuple[Trial, Outcome]]]:
    """Return a function that performs trials and yields each with what became of it.

    Args:
        gpus: GPUs such as ``0,1``; None for none in particular.
        jobs: Number of jobs side by side; None for one, one per GPU, or all trials on SLURM.
        launcher: ``local`` or ``slurm``.
        slurm: Options of ``sbatch``.
        rates: Function that returns the rates that time is estimated with.
        checks: Whether to validate the configurations before the first trial.

    Raises:
        ConfigError: GPUs that are not here, no submitit, or no SLURM.
    """
    if launcher == "local":
        slots = (
            trial_process.slots(gpus, jobs) if gpus is None or jobs is None else trial_process.shared_slots(gpus, jobs)
        )
        trial_process.check_gpus(gpus)
        return functools.partial(_performed, slots=slots, launch=fork, rates=rates, checks=checks)

    def submitted(trials: Sequence[Trial], root: Path) -> Iterator[tuple[Trial, Outcome]]:
        executor = slurm_job.executor((root / trial_jobs.FOLDER / "slurm").absolute(), slurm)
        slots = [Slot(f"slurm{i}", {}) for i in range(min(jobs or len(trials), len(trials)))]
        return _performed(trials, root, slots=slots, launch=submission(executor), rates=rates, checks=checks)

    return submitted


def _performed(
    trials: Sequence[Trial],
    root: Path,
    *,
    slots: Sequence[Slot],
    launch: Launcher,
    rates: Callable[[], Rates],
    checks: bool,
) -> Iterator[tuple[Trial, Outcome]]:
    planned = planned_work.plan_trials(trials, root, checks=checks)
    costs = cost_estimates.estimate(planned, rates())
    _logger.info(work_listing.start_text(planned, costs, len(slots)))
    seconds = {p.trial: c.seconds for p, c in zip(planned, costs) if c.seconds and not c.unknown_time}
    with job_display.JobDisplay(root, job_display.TimeLeft(seconds, len(slots))) as display:
        yield from trial_jobs.outcomes(trial_jobs.TrialJobs(planned, root, launch, display), slots)


def fork(job: TrialJob, slot: Slot) -> JobProcess:
    """Start a job in a process forked from the server that has imported torch."""
    arguments = (job.trial, job.folder.parents[1], job.folder)
    environment = trial_process.environment(slot)
    return ForkedJob(reproduce_job.run_job, arguments, environment, job.output, reproduce_job.IMPORTS)


def submission(executor: Any) -> Launcher:
    """Return a function that submits jobs to SLURM with an executor of submitit."""

    def submit(job: TrialJob, slot: Slot) -> JobProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        executor.update_parameters(name=job.folder.name)
        arguments = (job.trial, job.folder.parents[1], job.folder, dict(slot.environment))
        return slurm_job.SubmittedJob(
            executor.submit(slurm_job.ResumableJob(reproduce_job.run_submitted_job, arguments))
        )

    return submit
