"""Hold a run folder for one training: a lock file with host, process, its start and a heartbeat.

The process that trains (rank 0) holds ``run.lock`` from before it writes anything until it ends. A second one is refused with
exit code 6 and the holder's name. A lock is stale, and taken over with a notice, where its process is dead or another of the
same number was started since (same machine), or where its heartbeat is older than `STALE_AFTER` seconds (another machine).
Reports and ``analyze.py run=...`` take no lock: their files have names of their own and rows are appended whole. While a run
trains, ``analyze.py`` measures its checkpoints that stay as they are (``init``, ``epoch-0004``) and refuses the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import host_identity, is_alive, temporary_path
from vitscope.runtime.errors import LockHeldError, StorageError

_logger = logging.getLogger(__name__)

FILE = "run.lock"
#: seconds between two heartbeats, and after how many without one another machine's lock is stale
HEARTBEAT, STALE_AFTER = 10.0, 120.0
#: bytes that a lock stays below
_LARGEST = 1 << 16


@dataclass
class _Held:
    """A lock of this process: its text, and the event that ends its heartbeat."""

    text: str
    ended: threading.Event


_held: dict[Path, _Held] = {}


def acquire(folder: Path) -> None:
    """Take the lock of a run folder, which exists, and start its heartbeat.

    Raises:
        LockHeldError: Another training holds it.
        StorageError: The folder cannot be written.
    """
    folder = folder.absolute()
    path = folder / FILE
    text = json.dumps(_own_facts())
    candidate = temporary_path(path)
    safe_files.refuse_links(path)
    try:
        candidate.unlink(missing_ok=True)
        with candidate.open("x") as file:  # never through a link that waits under that name
            file.write(text)
        try:
            with exclusive(folder):
                while not _linked(candidate, path, text):
                    _refuse_or_take_over(path, candidate.stat().st_mtime)
        finally:
            candidate.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            "run", folder, f"not writable ({error.strerror})", "give it write permission, or start a new run"
        ) from None
    held = _Held(text, threading.Event())
    _held[folder] = held
    threading.Thread(target=_beat, args=(path, held), name="run-lock-heartbeat", daemon=True).start()


def release(folder: Path) -> None:
    """Give the lock back where this process holds it."""
    held = _held.pop(folder.absolute(), None)
    if held is None:
        return
    held.ended.set()
    path = folder.absolute() / FILE
    # the folder is gone, or something else lies there
    with contextlib.suppress(OSError, StorageError), exclusive(folder.absolute()):
        if safe_files.read_text(path, _LARGEST) == held.text:
            path.unlink()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of the same block: for a moment in which a file is read and then changed.

    The system gives it back when a process dies. On a file system without such locks the last writer wins.

    Raises:
        OSError: The folder is gone.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


@contextlib.contextmanager
def released_at_end() -> Iterator[None]:
    """Give back, at the end of the block, the locks that were taken in it."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            release(folder)


def check(folder: Path) -> None:
    """Raise where this process held the folder's lock and lost it.

    Raises:
        StorageError: The folder was deleted, or another process took the lock over.
    """
    held = _held.get(folder.absolute())
    if held is None:
        return
    try:
        text = safe_files.read_text(folder / FILE, _LARGEST)
    except FileNotFoundError:
        reason = "the run folder was deleted or renamed" if not folder.is_dir() else f"{FILE} was deleted"
        raise StorageError("run", folder, f"{reason} while it trained", "start a new run") from None
    except OSError:  # a file server that does not answer for a moment
        return
    if text != held.text:
        raise StorageError("run", folder, f"{_name_of(_facts(text))} took it over", "let one process train in it")


def own_name() -> str:
    """Return a name for files of this process that no process of this or another machine shares."""
    return f"{host_identity()}-{os.getpid()}-{secrets.token_hex(4)}"


def holds(folder: Path) -> bool:
    """Tell whether this process holds the folder's lock."""
    return folder.absolute() in _held


def living_holder(folder: Path) -> str | None:
    """Return the name of another process that trains in a folder and is alive; None where there is none. Nothing is written.

    A heartbeat of another machine is dated by that machine's file server: clocks that differ by more than `STALE_AFTER` deceive.

    Raises:
        StorageError: The lock is a link or no regular file.
    """
    path = folder.absolute() / FILE
    try:
        text, age = safe_files.read_text(path, 1 << 16), time.time() - path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    facts = _facts(text)
    is_other = not holds(folder) and _is_held(facts, age, path.parent)
    return _name_of(facts) if is_other else None


def _linked(candidate: Path, path: Path, text: str) -> bool:
    """Make the lock file, exclusively and with its text; return whether there was none."""
    try:
        os.link(candidate, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the text follows a moment later
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def _refuse_or_take_over(path: Path, now: float) -> None:
    """Raise where the holder lives; else move its lock aside, once, however many processes try.

    Args:
        path: File of the lock.
        now: Time by the clock of the file system, which also dates the heartbeats.
    """
    try:
        text, age = safe_files.read_text(path, _LARGEST), now - path.stat().st_mtime
    except FileNotFoundError:  # given back meanwhile
        return
    facts = _facts(text)
    if _is_held(facts, age, path.parent):
        reason = f"{_name_of(facts)} trains in this folder (last heartbeat {max(age, 0):.0f} s ago)"
        fix = f"wait until it ends, or choose another folder; a lock is stale after {STALE_AFTER:.0f} s without a heartbeat"
        raise LockHeldError("run", path.parent, reason, fix)
    aside = path.with_name(f".{path.name}.tmp-{own_name()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process took it over
        return
    if aside.read_text(errors="replace") != text:  # another process took it over before: its lock is put back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    else:
        _logger.warning(f"{path.parent}: the lock of {_name_of(facts)} is stale and was taken over")
    aside.unlink(missing_ok=True)


def _is_held(facts: dict[str, Any], age: float, folder: Path) -> bool:
    if facts.get("machine") == host_identity() and isinstance(pid := facts.get("pid"), int):
        if pid == os.getpid() and facts.get("started") == _start_time(pid):
            return folder in _held
        return is_alive(pid) and facts.get("started") == _start_time(pid)
    return age <= STALE_AFTER


def _own_facts() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": host_identity(), "pid": pid, "started": _start_time(pid),
            "token": secrets.token_hex(8)}  # fmt: skip


def _start_time(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since the machine was; None where the system does not tell."""
    try:
        # the name, in parentheses, may hold blanks: the fields after it are split
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _facts(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _name_of(facts: dict[str, Any]) -> str:
    return f"process {facts.get('pid', '?')} on {facts.get('host', 'an unknown host')}"


def _beat(path: Path, held: _Held) -> None:
    """Renew the lock's time until it is given back, or is no longer this process's."""
    while not held.ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError, StorageError):
            if safe_files.read_text(path, _LARGEST) == held.text and not held.ended.is_set():
                os.utime(path, follow_symlinks=False)
