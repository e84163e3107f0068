"""Run a function as a job in a process forked from a server that has paid for the imports once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscope.runtime import safe_files
from vitscope.sweep.parent_death import PR_SET_PDEATHSIG
from vitscope.sweep.trial_process import THREAD_VARIABLES


class ForkedJob:
    """A function in a process and session of its own, forked from a server of this process (see `JobProcess`).

    The server imports modules and computes nothing, so that neither threads of torch nor a CUDA context are forked.

    Args:
        function: Function of a module; returns the exit code.
        arguments: The function's arguments, which are pickled.
        environment: All environment variables of the job.
        output: File that takes standard output and standard error, appended to.
        imports: Modules that the server imports when the first job starts.
    """

    def __init__(
        self,
        function: Callable[..., int],
        arguments: Sequence[Any],
        environment: Mapping[str, str],
        output: Path,
        imports: Sequence[str] = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(imports))
        output.parent.mkdir(parents=True, exist_ok=True)
        self._process = context.Process(
            target=_run, args=(function, tuple(arguments), dict(environment), output), daemon=False
        )
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, where the process still runs."""
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: It still runs after that time.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("job", timeout or 0.0)
        return code

    def kill_all(self) -> None:
        """Kill it with all its own children."""
        if self._process.pid is None or self.poll() is not None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no session yet, and no children
            self._process.kill()


def _run(function: Callable[..., int], arguments: Sequence[Any], environment: Mapping[str, str], output: Path) -> None:
    os.setsid()
    if sys.platform == "linux":
        # end with the server, which ends with its parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = safe_files.open_to_append(output)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    _limit_threads(environment)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no handler of the server's at exit


def _limit_threads(environment: Mapping[str, str]) -> None:
    """Give torch its share of the cores: the server has read the variables of its own environment."""
    value = environment.get(THREAD_VARIABLES[0], "")
    torch = sys.modules.get("torch")
    if torch is not None and value.isdigit() and int(value) > 0:
        torch.set_num_threads(int(value))
