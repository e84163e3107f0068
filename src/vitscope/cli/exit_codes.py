"""How a command ends: signals in, one line and one exit code out. The only place that knows both.

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

import contextlib
import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import loading, target_allowlist
from vitscope.runs import checkpoint_io
from vitscope.runs.run_dir import Run
from vitscope.runtime import redaction, safe_files, stop_flag
from vitscope.runtime.errors import ConfigError, DistributedError, StorageError, VitscopeError
from vitscope.runtime.stop_flag import Interrupted

INTERRUPTED, TERMINATED = 130, 143
_STORAGE = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
)
_OURS = "VITSCOPE_SET_HYDRA_FULL_ERROR"
_current: Run | None = None


def entered(run: Run) -> None:
    """Name the run whose log takes tracebacks from now on."""
    global _current
    _current = run


def run(command: Callable[[], None]) -> None:
    """Run a command and end the process with its exit code."""
    sys.exit(code_of(command))


def code_of(command: Callable[[], None]) -> int:
    """Run a command; return its exit code after printing the one line that an error gets."""
    global _current
    if _current is not None:
        gc.collect()  # trainer, module and callbacks refer to each other: the last run's memory would wait for a chance
    _current = None
    stop_flag.clear()
    _install()
    # Hydra prints its own text and exits 1 unless this is set; the user's own wish for tracebacks is remembered
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1" and _OURS not in os.environ
    os.environ |= {
        "HYDRA_FULL_ERROR": "1",
        _OURS: "1",
    }  # the second tells the processes of other ranks whose wish it is
    try:
        with target_allowlist.held():  # Hydra may change the environment as a configuration says
            command()
    except BaseException as error:
        return _ended(error, wants_traceback)
    finally:
        if not wants_traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ.pop(_OURS, None)
    return 0


def explain(error: BaseException) -> VitscopeError | None:
    """Return an error as the one line that a user can act on; None for a defect."""
    for cause in _chain(error):
        if isinstance(cause, VitscopeError):
            return cause
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _refused(error)
    if isinstance(error, MisconfigurationException):
        return ConfigError("trainer", None, _first_line(error).rstrip("."), "correct its options")
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return ConfigError("config", None, "a group was given a value that is no name", "choose a name; see --help")
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return StorageError("paths.runs", error.filename, str(error.strerror), "free space or choose another folder")
    if type(error).__module__.startswith("torch.distributed") or "ProcessGroup" in str(error) or "gloo" in str(error):
        why = _first_line(error).partition("] ")[2].partition(". ")[0] or _first_line(
            error
        )  # after the place in its source
        return DistributedError("trainer.devices", None, f"another process died or hangs ({why})", "see its output")
    return None


def code_for(error: BaseException) -> int:
    """Return the exit code that an error will end the command with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (stopped := stop_flag.requested()) is not None:
        error = Interrupted(stopped)  # Lightning's own answer to SIGTERM
    if isinstance(error, Interrupted):
        return INTERRUPTED if error.signum == signal.SIGINT else TERMINATED
    known = explain(error)
    return known.exit_code if known else 1


def note_end(run: Run, code: int, **facts: object) -> None:
    """Write down in the run's folder how it ended; a disk that is full does not hide why it did."""
    status = {0: "finished", INTERRUPTED: "stopped", TERMINATED: "stopped"}.get(code, "failed")
    try:
        run.note(status=status, exit_code=code, **facts)
    except StorageError as error:
        if code == 0:
            raise
        if run.path.is_dir():  # one that was deleted is what the command ends with already
            _say(f"{error}")


def _ended(error: BaseException, wants_traceback: bool) -> int:
    stopped = stop_flag.requested()
    if isinstance(error, SystemExit) and stopped is not None:
        error = Interrupted(stopped)  # Lightning's own answer to SIGTERM, where it comes before ours
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    text = "".join(traceback.format_exception(error))
    _log(text)
    if wants_traceback:
        sys.stderr.write(text)
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        code = code_for(error)
        saved = _current is not None and checkpoint_io.present(_current.checkpoints)
        then = f"; go on with run={_current.path} ckpt_path=last" if _current and saved else ""
        _say(f"stopped by {signal.Signals(error.signum).name}{then}")
        return code
    known = explain(error)
    if known is not None:
        _say(f"error: {known}")
        return known.exit_code
    where = f"; the traceback is in {_current.log}" if _current else "; HYDRA_FULL_ERROR=1 shows the traceback"
    _say(f"error: {type(error).__name__}: {_first_line(error)}{where}")
    return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _log(text: str) -> None:
    if _current is None:
        return
    with contextlib.suppress(OSError, StorageError):  # a full disk: the line on stderr has to do
        safe_files.append_text(_current.log, redaction.masked(text))


def _install() -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # ignored: started under nohup
            signal.signal(signum, _handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT and stop_flag.requested() == signal.SIGINT:
        os._exit(INTERRUPTED)  # asked twice: now
    stop_flag.request(signum)


def _missing(error: MissingConfigException) -> ConfigError:
    wanted = error.missing_cfg_file or ""
    group, _, name = wanted.rpartition("/")
    names = list(error.options or []) or loading.options(group)
    return ConfigError(group or "config", name, "no such choice", loading.nearest(name, names))


def _refused(error: BaseException) -> ConfigError:
    for cause in _chain(error):
        parent = getattr(cause, "parent_node", None)
        key = getattr(cause, "full_key", None)
        if key and parent is not None and "not in struct" in str(cause):
            return ConfigError(
                key, None, "no such key", loading.nearest(key.rpartition(".")[2], map(str, parent.keys()))
            )
    text = _first_line(error)
    for cause in _chain(error):
        key = getattr(cause, "full_key", None)
        if key:
            return ConfigError(key, None, _first_line(cause), "correct the value")
    unread = any(isinstance(cause, OverrideParseException) for cause in _chain(error))
    fix = "write key=value, a list as runs=[a,b]; see --help" if unread else "see --help"
    return ConfigError("config", None, text.rstrip("."), fix)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def _first_line(error: BaseException) -> str:
    text = redaction.masked(str(error)).strip()  # before it is cut: half of a secret would not be known
    return text.splitlines()[0][:300] if text else type(error).__name__
