"""Atomic writes of small files: a reader sees the old content or the new one, and leftovers of a kill are swept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
from pathlib import Path

from vitscope.runtime import safe_files
from vitscope.runtime.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, and a crash leaves either.

    Raises:
        StorageError: With what the system said.
    """
    temporary = temporary_path(path)
    try:
        safe_files.refuse_links(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that waits under that name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)
        raise StorageError(
            "paths.runs", path, f"not writable ({error.strerror})", "free space or choose another folder"
        ) from None


def temporary_path(path: Path) -> Path:
    """Return where this process writes what it will rename to ``path``: its host and process are in the name."""
    return path.with_name(f".{path.name}.tmp-{host_identity()}-{os.getpid()}")


@functools.cache
def host_identity() -> str:
    """Return 8 digits that name this machine since it was started, and the space in which its process ids hold."""
    facts = [socket.gethostname()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):  # no Linux: the name has to do
            facts.append(read())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def sweep(folder: Path) -> None:
    """Delete the temporary files that dead processes of this machine left in ``folder``; other machines' are left alone."""
    safe_files.refuse_links(folder)
    for file in folder.glob(".*.tmp-*"):
        *host, owner = file.name.rpartition(".tmp-")[2].split("-")
        if owner.isdigit() and host in ([], [host_identity()]) and not is_alive(int(owner)):
            with contextlib.suppress(OSError):  # a folder, or no longer ours
                file.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Tell whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
