"""Start the ranks of ``analyze.py trainer=ddp`` on this machine, and end all of them where one fails.

The process that starts them measures nothing: it waits, passes signals on and ends with the exit code of the rank that failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, DistributedError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import trial_process

#: seconds between two looks at the ranks
INTERVAL = 0.1
#: seconds that the other ranks have to end by themselves after one failed, and then to follow SIGTERM
GRACE = 5.0
#: variable of ``vitscope.cli.main``, which the ranks' own command line replaces
_COMMAND = "VITSCOPE_COMMAND"


def run_ranks(n_ranks: int, arguments: Sequence[str]) -> None:
    """Run this command in several processes and wait for them.

    Args:
        n_ranks: Number of processes.
        arguments: Command line without the program's name.

    Raises:
        ConfigError: A multirun, whose jobs would start ranks of the whole multirun.
        SystemExit: With the exit code of a rank that failed and has said why.
        DistributedError: A rank was killed.
        Interrupted: A signal asked to stop.
    """
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        raise ConfigError("trainer", None, "a multirun cannot start several processes a job", "leave out -m")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(n_ranks)}
    shared = trial_process.environment(None, **trial_process.threads(n_ranks), **address, LOCAL_WORLD_SIZE=str(n_ranks))
    shared.pop(_COMMAND, None)
    command = [sys.executable, "-m", "vitscope.sweep.parent_death", str(os.getpid()), *_program(), *arguments]
    ranks = [
        start_rank(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"})
        for rank in range(n_ranks)
    ]
    try:
        codes = _wait(ranks)
    finally:
        _end(ranks)
    if (signum := stop_flag.requested()) is not None:
        raise Interrupted(signum)
    if any(codes):
        _raise_failure(codes)


def start_rank(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one rank in a session of its own, so that a terminal's SIGINT reaches it once, from this process."""
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _program() -> list[str]:
    """Return the command that started this process, without its arguments."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.name != "__main__.py" and script.is_file():
        return [sys.executable, str(script)]
    return [sys.executable, "-m", "vitscope", "analyze"]


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all ranks ended, or one failed and the others had time to end too.

    Returns:
        The exit codes, negative after a signal; None for a rank that still runs.
    """
    failure_time: float | None = None
    is_stopping = False
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return codes
        if (signum := stop_flag.requested()) is not None and not is_stopping:
            is_stopping, failure_time = True, None
            for rank in ranks:
                _send(rank, signum)
            deadline = time.monotonic() + trial_process.GRACE
        if is_stopping and time.monotonic() > deadline:
            return codes
        if not is_stopping and any(codes):  # None and 0 are none
            failure_time = failure_time or time.monotonic()
            if time.monotonic() - failure_time > GRACE:
                return codes
        time.sleep(INTERVAL)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End ranks that still run: SIGTERM first, SIGKILL for those that do not follow, such as a stopped process."""
    for rank in ranks:
        _send(rank, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _send(rank, signal.SIGKILL)
            rank.wait()


def _send(rank: subprocess.Popen[bytes], signum: int) -> None:
    if rank.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(signum)


def _raise_failure(codes: Sequence[int | None]) -> None:
    """Raise for the rank whose end is the cause: one with an error of its own before those that lost it."""
    own_errors = [code for code in codes if code is not None and code > 0 and code != DistributedError.exit_code]
    if own_errors:
        sys.exit(own_errors[0])
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            reason = f"rank {rank} was killed by {signal.Signals(-code).name}"
            raise DistributedError("trainer.devices", None, reason, "see the system's log, or use fewer processes")
    sys.exit(DistributedError.exit_code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
