"""The package's logger: messages for the user from the main process alone; importing this module imports no torch.

Modules call ``logging.getLogger(__name__)``. In a notebook or a program the package adds no handler and sets no level, so that
``logging.getLogger("vitscope").setLevel(...)`` and the program's own handlers decide. A command prints messages on stderr, from
level INFO on unless the environment variable ``VITSCOPE_LOG_LEVEL`` names another. What a command was asked for (tables,
help, progress bars, the final ``error:`` line) is printed, not logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from vitscope.runtime import redaction
from vitscope.runtime.errors import ConfigError

#: set by torchrun, Lightning and SLURM before a process group exists
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")

#: the environment variable that sets the lowest level which a command prints
LEVEL_VARIABLE = "VITSCOPE_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_package_logger = logging.getLogger("vitscope")

#: takes a copy of each line that a command prints, with its line break, see `copy_lines_to`
_take_copy: Callable[[str], None] | None = None


def is_main_process() -> bool:
    """Tell whether this process is rank 0: of the process group, or before there is one by the environment."""
    distributed = sys.modules.get("torch.distributed")  # there is a process group only where it has been imported
    is_initialized = getattr(distributed, "is_initialized", None)  # None also while the module is being imported
    if distributed is not None and is_initialized is not None and is_initialized():
        return distributed.get_rank() == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in _RANK_VARIABLES)


def copy_lines_to(take_copy: Callable[[str], None] | None) -> None:
    """Name a function that takes a copy of each message that a command prints, such as its run's log; None for none."""
    global _take_copy
    _take_copy = take_copy


def _copied(line: str) -> str:
    """Return a line, of which the function that `copy_lines_to` named has a copy."""
    if _take_copy is not None:
        _take_copy(line)
    return line


def log_problem(logger: logging.Logger, line: str) -> None:
    """Log a line that opens with its own label, which a command prints without the level before it.

    Args:
        logger: The logger of the calling module.
        line: A line such as ``failed: run x: test/nll (not finite)``; ``failed:`` is of level ERROR, every other one of
            level WARNING.
    """
    level = logging.ERROR if line.startswith("failed:") else logging.WARNING
    logger.log(level, line, extra={"has_label": True}, stacklevel=2)


class _StderrHandler(logging.Handler):
    """Writes each record of rank 0 as one line on the present ``sys.stderr``; from WARNING on with its level before it.

    A record of `log_problem` is written as it is, for its text opens with a label.
    """

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: is_main_process())

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        shows_level = record.levelno >= logging.WARNING and not getattr(record, "has_label", False)
        prefix = f"{record.levelname.lower()}: " if shows_level else ""
        line = _copied(prefix + redaction.masked(record.getMessage()) + "\n")
        with contextlib.suppress(OSError, ValueError):  # a stream that is closed or full must not end a training
            print(line, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def command_logging() -> Iterator[None]:
    """Print log messages and Python's warnings as one line each while a command runs.

    Raises:
        ConfigError: ``VITSCOPE_LOG_LEVEL`` names no level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in LEVELS:
        raise ConfigError(
            LEVEL_VARIABLE, os.environ[LEVEL_VARIABLE], "no such level", f"set one of {', '.join(LEVELS)}"
        )
    handler = _StderrHandler()
    level_before, propagate_before = _package_logger.level, _package_logger.propagate
    format_before = warnings.formatwarning
    _package_logger.addHandler(handler)
    _package_logger.setLevel(level)
    _package_logger.propagate = False
    warnings.formatwarning = _warning_line  # showwarning stays Python's: pytest and catch_warnings record through it
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        _package_logger.propagate = propagate_before
        _package_logger.setLevel(level_before)
        _package_logger.removeHandler(handler)


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line without its place in the source; '' on other ranks and below the level."""
    if not is_main_process() or not _package_logger.isEnabledFor(logging.WARNING):
        return ""
    return _copied(f"warning: {redaction.masked(' '.join(str(message).split()))}\n")
