"""End of a run: its status in provenance.json, and the messages and tracebacks of its process in its log."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from vitscope.config.error_translation import INTERRUPTED, TERMINATED
from vitscope.runtime import redaction, safe_files
from vitscope.runtime.errors import StorageError
from vitscope.runtime.logging import copy_lines_to

if TYPE_CHECKING:  # a command that refuses its arguments has no run and does not load what one needs
    from vitscope.runs.run_dir import Run

_logger = logging.getLogger(__name__)

_current: Run | None = None


def log_tracebacks_to(run: Run | None) -> None:
    """Name the run of this process, whose log takes messages and tracebacks from now on; None for no run."""
    global _current
    _current = run
    copy_lines_to(_append if run is not None else None)
    _append("")  # so that there is a log


def current_run() -> Run | None:
    """Return the run that `log_tracebacks_to` named last."""
    return _current


def log_traceback(text: str) -> None:
    """Append a traceback to the log of the current run, if there is one."""
    _append(redaction.masked(text))


def _append(text: str) -> None:
    if _current is None or not _current.path.is_dir():
        return
    with contextlib.suppress(OSError, StorageError):  # on a full disk the line on stderr has to do
        safe_files.append_text(_current.log, text)


def note_end(run: Run, code: int, **facts: object) -> None:
    """Write into the run's provenance how it ended.

    Args:
        run: The run.
        code: The exit code of its process.
        facts: Further facts of the end, such as ``wall_s``.

    Raises:
        StorageError: The run finished and its folder cannot be written; after another end that error is printed alone, so
            that it does not hide why the run ended.
    """
    status = {0: "finished", INTERRUPTED: "stopped", TERMINATED: "stopped"}.get(code, "failed")
    try:
        run.note(status=status, exit_code=code, **facts)
    except StorageError as error:
        if code == 0:
            raise
        if run.path.is_dir():  # a folder that was deleted is what the command ends with already
            _logger.warning(str(error))
