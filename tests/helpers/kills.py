"""Stop an action at its n-th change of a folder, for every n: by a kill, a full disk, or a copy of what a kill would leave."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from vitscope.runtime.errors import VitscopeError

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
KILLED = 9


def at_every_change(
    prepared: Callable[[int], Path], action: Callable[[Path], object], *, full_disk: bool = False, step: int = 1
) -> Iterator[tuple[Path, int]]:
    """Yield the folder and the exit code of each child, until one gets through to its end.

    Args:
        prepared: makes the folder of the n-th child.
        action: what the child does with it.
        full_disk: raise ENOSPC at the change and all later ones that need space, in place of the kill.
        step: of n.
    """
    n = 1
    while True:
        folder = prepared(n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which only wait
            child = os.fork()
        if child == 0:
            os._exit(_changed(folder, n, action, full_disk))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        yield folder, code
        n += step


def _changed(folder: Path, n: int, action: Callable[[Path], object], full_disk: bool) -> int:
    count = 0

    def change(needs_space: bool = True) -> None:
        nonlocal count
        count += 1
        if count == n and not full_disk:
            os._exit(KILLED)
        if count >= n and full_disk and needs_space:
            raise OSError(28, "No space left on device")

    _watch(folder, change)
    try:
        action(folder)
    except VitscopeError as error:
        return error.exit_code
    except BaseException as error:
        sys.stderr.write(repr(error))
        return 1
    return 0


def _watch(folder: Path, change: Callable[..., None]) -> None:
    """Call ``change`` before each change of a folder, for the rest of this process's life."""

    def hook(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        if event == "open" and path.startswith(str(folder)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            change()
        elif event in _CHANGES and path.startswith(str(folder)):
            change(needs_space=event in ("os.mkdir", "os.link"))

    def reached(original: Callable) -> Callable:
        def deadly(*arguments: object) -> object:
            change()
            return original(*arguments)

        return deadly

    os.fsync, os.write = reached(os.fsync), reached(os.write)
    sys.addaudithook(hook)


def snapshots(folder: Path, into: Path, action: Callable[[], int], *, first: int = 0, step: int = 1) -> list[Path]:
    """Run an action in a forked child and copy a folder before each of its changes of it: what a kill there would leave.

    A kill loses nothing that the system was given and everything that it was not, as the copy does. The child has ended when the
    copies are used: its process id is a dead one's. Checkpoints are copied as hard links, for they are never written twice.

    Args:
        folder: to copy.
        into: a folder for the copies, each named by the number of changes before it.
        action: returns its exit code.
        first: number of changes before the first copy.
        step: number of changes between two copies.

    Returns:
        The copies, in their order.
    """
    into.mkdir()

    def child() -> int:
        count, is_copying = 0, False

        def copy() -> None:
            nonlocal count, is_copying
            if not is_copying:
                is_copying = True
                if count >= first and (count - first) % step == 0:
                    shutil.copytree(folder, into / str(count), copy_function=_copied)
                count, is_copying = count + 1, False

        _watch(folder, lambda needs_space=True: copy())
        return action()

    assert in_child(child) == 0
    return sorted(into.iterdir(), key=lambda copy: int(copy.name))


def _copied(source: str, target: str) -> None:
    is_checkpoint = ".ckpt" in source
    (os.link if is_checkpoint else shutil.copy2)(source, target)


def in_child(action: Callable[[], int]) -> int:
    """Run an action in a forked child; return its exit code, which is what the action returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which only wait
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a kill."""
