"""Map exceptions and signals of a command to one-line messages and exit codes.

=====  =====================================================================
code   meaning
=====  =====================================================================
0      finished
1      a defect of vitscope or of a library: the traceback is in the run's log
2      configuration
3      data
4      checkpoint
5      numerical
6      storage
7      distributed
130    interrupted (SIGINT)
143    terminated (SIGTERM, SIGHUP, SIGUSR1): saved, can be resumed
=====  =====================================================================
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from vitscope.config.error_translation import INTERRUPTED, code_for, explain
from vitscope.runs import run_end
from vitscope.runtime import stop_flag, trusted_packages
from vitscope.runtime.errors import DistributedError, first_line
from vitscope.runtime.logging import command_logging, is_main_process
from vitscope.runtime.stop_flag import Interrupted


def run(command: Callable[[], None]) -> None:
    """Run a command and end the process with its exit code."""
    sys.exit(run_command(command))


def run_command(command: Callable[[], None]) -> int:
    """Run a command; return its exit code after printing the one line that an error gets."""
    if run_end.current_run() is not None:
        gc.collect()  # trainer, module and callbacks refer to each other: the last run's memory would wait for a chance
    run_end.log_tracebacks_to(None)
    stop_flag.clear()
    _install()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        # Hydra may change the environment as a configuration says: trust and the log level are read before
        with command_logging(), trusted_packages.held():
            command()
    except BaseException as error:
        return _ended(error, wants_traceback)
    return 0


def _ended(error: BaseException, wants_traceback: bool) -> int:
    stopped = stop_flag.requested()
    if isinstance(error, SystemExit) and stopped is not None:
        error = Interrupted(stopped)  # Lightning's own answer to SIGTERM, where it comes before ours
    if stopped is not None and code_for(error) == DistributedError.exit_code:
        error = Interrupted(stopped)  # all ranks were asked to stop, and another one was faster
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    run = run_end.current_run()
    text = "".join(traceback.format_exception(error))
    run_end.log_traceback(text)
    if wants_traceback:
        sys.stderr.write(text)
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        if not is_main_process():
            return code_for(error)
        _print_on_stderr(f"stopped by {signal.Signals(error.signum).name}{_resume_advice()}")
        return code_for(error)
    explained = explain(error)
    if explained is not None:
        _print_on_stderr(f"error: {explained}")
        return explained.exit_code
    where = f"; the traceback is in {run.log}" if run else "; HYDRA_FULL_ERROR=1 shows the traceback"
    _print_on_stderr(f"error: {type(error).__name__}: {first_line(error)}{where}")
    return 1


def _resume_advice() -> str:
    """Return how to resume the current run, '' where there is no run or no checkpoint."""
    run = run_end.current_run()
    if run is None:
        return ""
    from vitscope.runs.checkpoints import checkpoint_io  # imports torch, which the process of a run has loaded

    return f"; resume with run={run.path} ckpt_path=last" if checkpoint_io.present(run.checkpoints) else ""


def _print_on_stderr(line: str) -> None:
    """Print a line; a rank other than the first opens it with its number."""
    prefix = "" if is_main_process() else f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '?'))}: "
    print(f"{prefix}{line}", file=sys.stderr, flush=True)


def _install() -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # ignored: started under nohup
            signal.signal(signum, _handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT and stop_flag.requested() == signal.SIGINT:
        os._exit(INTERRUPTED)  # asked twice: now
    stop_flag.request(signum)
