"""Detect a shortage of file descriptors before a loader worker loses a batch, which would block training forever."""

from __future__ import annotations

import errno
import os
import resource

from vitscope.runtime.errors import StorageError

#: descriptors that a worker needs to hand a batch over: two a tensor, and a socket where they are fetched from
SPARE = 16
_TEXTS = ("too many open files", "items of ancdata", "unable to open shared memory")


def shortage() -> StorageError:
    """Return the error of a process that has no descriptor left."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fix = "raise the limit (ulimit -n 65536), or use fewer workers (data.num_workers=0)"
    return StorageError("data.num_workers", None, f"too many open files (this process may have {limit})", fix)


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error, of the system or of torch, says that no descriptor is left."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    return isinstance(error, OSError | RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def check_spare() -> None:
    """Raise where fewer than `SPARE` descriptors are left.

    A worker whose batch cannot be handed over says so in a thread that nobody reads, and the main process waits for ever.

    Raises:
        StorageError: There are too few.
    """
    opened = []
    try:
        for _ in range(SPARE):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if not is_shortage(error):
            raise
        raise shortage() from None
    finally:
        for descriptor in opened:
            os.close(descriptor)
