"""Run an action in a forked child that is killed, or meets a full disk, at its n-th change of a folder, for every n."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from vitscope.errors import VitscopeError

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
    try:
        action(folder)
    except VitscopeError as error:
        return error.exit_code
    except BaseException as error:
        sys.stderr.write(repr(error))
        return 1
    return 0
