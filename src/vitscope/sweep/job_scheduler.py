"""Run jobs side by side, one per slot, until none is left; end all of them when this process is asked to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from vitscope.runtime import stop_flag
from vitscope.sweep import trial_process
from vitscope.sweep.trial_process import JobProcess, Slot

Job = TypeVar("Job")

#: seconds between two looks at the running jobs
POLL_S = 0.05


class JobSource(Protocol[Job]):
    """Supplies jobs and takes note of how they end."""

    def next_job(self) -> Job | None:
        """Return the next job that can start now; None where there is none, which is final only once no job runs."""
        ...

    def ended_elsewhere(self) -> list[Job]:
        """Return the jobs that another invocation has ended since the last call."""
        ...

    def waits_for_others(self) -> bool:
        """Tell whether another invocation performs a job that this one may still have to perform."""
        ...

    def start(self, job: Job, slot: Slot, /) -> JobProcess:
        """Start a job in a slot."""
        ...

    def end(self, job: Job, process: JobProcess, /, stopping: bool) -> None:
        """Take note of a job whose process has ended; ``stopping``: all jobs were asked to end."""
        ...

    def watch(self) -> None:
        """Look after the running jobs; called about 20 times a second."""
        ...


def side_by_side_seconds(seconds: Sequence[float], n_slots: int) -> float:
    """Return the least time in seconds that jobs can take side by side, each as fast as alone.

    It is the time of the longest job, or that of all of them shared evenly among the slots.

    Args:
        seconds: Time of each job in seconds.
        n_slots: Number of jobs that run at a time.
    """
    return max(max(seconds, default=0.0), sum(seconds) / n_slots)


def run_jobs(source: JobSource[Job], slots: Sequence[Slot]) -> Iterator[Job]:
    """Run a source's jobs, at most one in each slot at a time; yield each job after its end was noted, here or elsewhere.

    Args:
        source: Supplies the jobs.
        slots: Places where jobs run.

    Raises:
        Interrupted: A stop was asked for. The running jobs have got the signal, have saved and have ended.
    """
    running: dict[str, tuple[Job, JobProcess]] = {}
    try:
        while True:
            stop_flag.check()
            for slot in (slot for slot in slots if slot.name not in running):
                if (job := source.next_job()) is None:
                    break
                running[slot.name] = (job, source.start(job, slot))
            yield from source.ended_elsewhere()
            if not running and not source.waits_for_others():
                return
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    source.end(job, process, stopping=False)
                    yield job
            source.watch()
            time.sleep(POLL_S)
    finally:
        trial_process.stop([process for _, process in running.values()], stop_flag.requested() or signal.SIGTERM)
        for job, process in running.values():
            source.end(job, process, stopping=True)
