"""End the threads of OpenMP before a fork: they do not survive it, and a child that computes would wait for them for ever."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_HARD_PAUSE = 2  # omp_pause_hard of OpenMP 5.0: give back every thread; the next parallel region starts new ones


def install() -> None:
    """Pause OpenMP of the forking thread before each fork, for the rest of this process's life."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    pauses = [ctypes.CDLL(str(library)).omp_pause_resource_all for library in libraries]

    def pause() -> None:
        for pause_all in pauses:
            pause_all(_HARD_PAUSE)

    os.register_at_fork(before=pause)
