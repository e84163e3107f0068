"""Opens files inside of run folders without following symbolic links and without waiting for pipes.

A run folder may come from a stranger: a link in it would make vitscope read, append to or delete what lies elsewhere. The run
folder itself may be reached by links.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vitscope.runtime.errors import StorageError

#: folders that are a run's also where its own files are not there
_FOLDERS = ("checkpoints",)
#: bytes that a configuration, a provenance, a manifest or a result's readable file stays far below
LARGEST = 64 * 2**20
#: bytes that a file of metrics stays below
LARGEST_METRICS = 2**32
#: levels below the run folder at which vitscope keeps files: results/<analysis>/.partial-<name>/<file>
_DEPTH = 4


def refuse_links(path: Path) -> None:
    """Refuse a path that leads through a symbolic link inside of a run folder; other paths pass.

    Raises:
        StorageError: Naming the link.
    """
    linked: Path | None = None
    below = path
    for folder in list(path.parents)[:_DEPTH]:
        if below.is_symlink():
            linked = below
        if below.name in _FOLDERS or os.path.lexists(folder / "config.yaml"):
            if linked is not None:
                fix = "put the file or folder itself there"
                raise StorageError("run", linked, "a symbolic link inside of a run folder", fix)
            return
        below = folder


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to a regular file, made where there is none.

    Raises:
        StorageError: A link, or something that is no regular file.
        OSError: As the system says.
    """
    refuse_links(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    return _regular(descriptor, path)


def open_to_read(path: Path) -> int:
    """Return a descriptor that reads a regular file.

    Raises:
        StorageError: A link, or something that is no regular file (a pipe would be waited for without end).
        OSError: As the system says.
    """
    refuse_links(path)
    return _regular(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), path)


def read_text(path: Path, largest: int | None = None) -> str:
    """Return a file's text; bytes that are no UTF-8 are replaced.

    Raises:
        StorageError: A link, no regular file, or larger than ``largest`` bytes.
        OSError: As the system says.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if largest is not None and size > largest:
            raise StorageError("run", path, f"has {size} bytes, more than the {largest} expected", "use another run")
        return file.read().decode(errors="replace")


def append_text(path: Path, text: str) -> None:
    """Append a text to a file of a run.

    Raises:
        StorageError: A link, or no regular file.
        OSError: As the system says.
    """
    with os.fdopen(open_to_append(path), "a") as file:
        file.write(text)


def _regular(descriptor: int, path: Path) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError("run", path, "not a regular file", "use another run, or delete it")
    return descriptor
