"""Submit trials of a reproduction as SLURM jobs through submitit."""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscope.runtime.errors import ConfigError

#: seconds between two questions to SLURM while a job is waited for
POLL_S = 1.0
#: states of a job that waits for a node; UNKNOWN until SLURM's accounting lists it
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "CONFIGURING", "QUEUED", "UNKNOWN")


def executor(folder: Path, parameters: Mapping[str, Any], cluster: str = "slurm") -> Any:
    """Return submitit's executor.

    Args:
        folder: Folder on a file system that login and compute nodes share; takes submitit's files.
        parameters: Options of ``sbatch`` such as ``partition``, ``time`` (minutes) or ``gres``.
        cluster: ``slurm``; ``local`` and ``debug`` are submitit's executors on this machine, for tests.

    Raises:
        ConfigError: submitit is not installed, there is no ``sbatch``, or an unknown parameter.
    """
    try:
        submitit = importlib.import_module("submitit")
    except ImportError:
        reason = "submitit is not installed"
        raise ConfigError("launcher", "slurm", reason, "pip install 'vitscope[submitit]', or use gpus=0,1") from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher", "slurm", "no SLURM here (sbatch not found)", "run it on a login node, or use gpus=0,1"
        )
    instance = submitit.AutoExecutor(folder=folder, cluster=cluster)
    for name, value in parameters.items():
        try:
            instance.update_parameters(**{f"slurm_{name}": value})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            reason = f"submitit refuses it ({' '.join(str(error).split())[:160]})"
            raise ConfigError(
                f"slurm.{name}", value, reason, "write slurm.partition=gpu, slurm.time=1440, ..."
            ) from None
    return instance


class ResumableJob:
    """A function that submitit calls on the compute node, and submits again when SLURM preempts it or its time ends.

    A trial resumes from its checkpoint, so that what is submitted again is the same call.
    """

    def __init__(self, function: Callable[..., int], arguments: Sequence[Any]) -> None:
        self.function, self.arguments = function, tuple(arguments)

    def __call__(self) -> int:
        """Call the function; return its exit code."""
        return self.function(*self.arguments)

    def checkpoint(self) -> Any:
        """Return what submitit submits when the job is preempted or out of time."""
        return importlib.import_module("submitit").helpers.DelayedSubmission(self)


class SubmittedJob:
    """A submitted job as the scheduler handles it (see `sweep.trial_process.JobProcess`)."""

    def __init__(self, job: Any) -> None:
        self.job = job
        self._is_cancelled = False
        self._asked, self._code = 0.0, None

    def poll(self) -> int | None:
        """Return the exit code; None while the job waits or runs. SLURM is asked at most once a second."""
        now = time.monotonic()
        if self._code is None and now - self._asked >= POLL_S:
            self._asked = now
            if self.job.done():
                self._code = self._exit_code()
        return self._code

    @property
    def is_queued(self) -> bool:
        """Whether the job waits for a node, at first or again; submitit asks SLURM for its state about once a minute."""
        return self._code is None and str(self.job.state).partition(" ")[0] in _QUEUED

    def _exit_code(self) -> int:
        if self._is_cancelled:
            return -signal.SIGTERM
        error = self.job.exception()
        return 1 if error is not None else int(self.job.result())

    def send_signal(self, sig: int, /) -> None:
        """Cancel the job: SLURM sends SIGTERM to its processes, and they save."""
        self._is_cancelled = True
        self.job.cancel(check=False)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended after that time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"SLURM job {self.job.job_id}", timeout or 0.0)
            time.sleep(0.1)
        return code

    def kill_all(self) -> None:
        """Cancel the job once more; what is left of it is SLURM's."""
        self.job.cancel(check=False)
        self._code = -signal.SIGKILL
