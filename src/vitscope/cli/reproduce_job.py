"""One trial of a reproduction in a process of its own: train and measure, then write what became of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from vitscope.cli import exit_codes
from vitscope.config import error_translation
from vitscope.reproduce import trial_jobs
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.runs import run_lock
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import LockHeldError
from vitscope.runtime.stop_flag import Interrupted

_logger = logging.getLogger(__name__)

#: modules that a server of jobs imports
IMPORTS = ("vitscope.reproduce.trial", __name__)

#: seconds between two looks at a folder that another process holds
_WAIT_S = 1.0


def run_job(trial: Trial, root: Path, folder: Path) -> int:
    """Perform a trial and write its outcome into ``folder``; return the exit code of the process.

    Args:
        trial: Trial to perform.
        root: The folder of runs.
        folder: Folder of the job.
    """
    outcomes: list[Outcome] = []

    def work() -> None:
        with run_lock.released_at_end():
            folder.mkdir(parents=True, exist_ok=True)
            _hold(folder)
            outcomes.append(attempted(trial, root))

    code = exit_codes.run_command(work)
    if stop_flag.requested() is not None:
        return code
    outcome = outcomes[0] if outcomes else Outcome(None, (f"{trial.name} (exit code {code}, see {folder}/output.txt)",))
    trial_jobs.write_outcome(outcome, folder)
    return code


def _hold(folder: Path) -> None:
    """Hold a job's folder, so that others wait for this process should the one that started it be killed.

    A process that an earlier start left behind is waited for: it saves what it has.
    """
    while True:
        try:
            run_lock.acquire(folder)
        except LockHeldError:
            stop_flag.check()
            time.sleep(_WAIT_S)
        else:
            return


def run_submitted_job(trial: Trial, root: Path, folder: Path, environment: Mapping[str, str]) -> int:
    """Perform a trial on a compute node of SLURM, as `run_job`; what it prints also goes to the job's ``output.txt``.

    Args:
        trial: Trial to perform.
        root: The folder of runs.
        folder: Folder of the job.
        environment: Environment variables to set.
    """
    from vitscope.sweep import trial_process

    for name in [name for name in os.environ if trial_process.is_private(name)]:
        del os.environ[name]  # the training starts its own ranks
    os.environ.update(environment)
    output = folder / trial_process.OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    stdout, stderr = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        return run_job(trial, root, folder)
    finally:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for number in (descriptor, stdout, stderr):
            os.close(number)


def attempted(trial: Trial, root: Path) -> Outcome:
    """Perform a trial; one that fails is an outcome with its reason, and its traceback goes where errors go."""
    from vitscope.reproduce.trial import perform  # imports torch, which the process that starts trials does not need

    try:
        return perform(trial, root)
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        explained = error_translation.explain(error)
        _logger.error(str(explained or repr(error)))
        return Outcome(None, (f"{trial.name} ({explained or repr(error)})",))
