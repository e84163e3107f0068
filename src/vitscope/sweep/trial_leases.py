"""Leases of trials: several invocations of one command, also on several machines, share the trials of a folder.

A lease is a folder below ``leases`` that its invocation holds with the lock of run folders (`vitscope.runs.run_lock`): a file
with host, process and its start, made exclusively by a hard link, whose heartbeat a thread renews. A lease is dead where its
process is, on the same machine, or where it had no heartbeat for `vitscope.runs.run_lock.STALE_AFTER` seconds by the clock of the
file system, whatever the machines' own clocks say. Of all that find it dead one takes it over.
"""

from __future__ import annotations

import time
from pathlib import Path

from vitscope.runs import run_lock
from vitscope.runtime.errors import LockHeldError, StorageError

#: folder of the leases
FOLDER = "leases"
#: seconds between two looks at a lease that another invocation holds
LOOK_S = 1.0


class TrialLeases:
    """The leases of a folder of trials, some of which this invocation holds.

    Args:
        folder: Folder that all invocations share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._held: set[str] = set()
        self._looked: dict[str, float] = {}
        self._started_ns: int | None = None

    def acquire(self, name: str) -> bool:
        """Take the lease of a trial; return whether this invocation has it now.

        A lease that another one held a moment ago is not looked at again before `LOOK_S`.

        Raises:
            StorageError: The folder cannot be written.
        """
        if name in self._held:
            return True
        now = time.monotonic()
        if now - self._looked.get(name, -LOOK_S) < LOOK_S:
            return False
        folder = self._folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run_lock.acquire(folder)
        except LockHeldError:
            self._looked[name] = now
            return False
        except OSError as error:
            raise _not_writable(folder, error) from None
        self._held.add(name)
        return True

    def release(self, name: str, *, again_later: bool = False) -> None:
        """Give a lease back; ``again_later``: it is not to be taken again before `LOOK_S`."""
        if again_later:
            self._looked[name] = time.monotonic()
        if name in self._held:
            self._held.discard(name)
            run_lock.release(self._folder / name)

    def close(self) -> None:
        """Give all leases back."""
        for name in list(self._held):
            self.release(name)

    def begin(self) -> None:
        """Note the time of the file system, once: what is written later was written while this invocation ran."""
        if self._started_ns is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f".begin-{run_lock.own_name()}"
            probe.write_bytes(b"")
            self._started_ns = probe.stat().st_mtime_ns
            probe.unlink()
        except OSError as error:
            raise _not_writable(self._folder, error) from None

    def is_new(self, path: Path) -> bool:
        """Tell whether a file was written after `begin`, by the clock of the file system."""
        try:
            return self._started_ns is not None and path.stat().st_mtime_ns > self._started_ns
        except OSError:
            return False


def _not_writable(folder: Path, error: OSError) -> StorageError:
    fix = "give it write permission, or set paths.runs to another folder"
    return StorageError("paths.runs", folder, f"not writable ({error.strerror})", fix)


def is_in_use(folder: Path) -> bool:
    """Tell whether another living process holds a folder: the child of an invocation that was killed saves before it ends.

    A lock that is stale by the clock of the file system is removed.
    """
    if not (folder / run_lock.FILE).exists():
        return False
    try:
        run_lock.acquire(folder)
    except LockHeldError:
        return True
    run_lock.release(folder)
    return False
