"""Let forked children compute: the threads of OpenMP and of autograd do not survive a fork."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_HARD_PAUSE = 2  # omp_pause_hard of OpenMP 5.0: give back every thread; the next parallel region starts new ones


def install() -> None:
    """Pause OpenMP of the forking thread before each fork, and keep autograd without threads, for this process's life.

    A child that enters a parallel region would wait for its parent's OpenMP threads for ever. Autograd decides at the first
    backward pass of a process whether it starts threads: it does if `torch.compile` ran before, and refuses to run in children.
    """
    torch.ones((), requires_grad=True).backward()
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    pauses = [ctypes.CDLL(str(library)).omp_pause_resource_all for library in libraries]

    def pause() -> None:
        for pause_all in pauses:
            pause_all(_HARD_PAUSE)

    os.register_at_fork(before=pause)
