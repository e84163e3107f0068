"""Lines for the user on stderr, from the main process alone; importing this module imports no torch."""

from __future__ import annotations

import os
import sys

#: set by torchrun, Lightning and SLURM before a process group exists
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_main_process() -> bool:
    """Tell whether this process is rank 0 by its environment, also before there is a process group."""
    return all(int(os.environ.get(name, "0")) == 0 for name in _RANK_VARIABLES)


def notify(line: str) -> None:
    """Print one line on stderr, on the main process alone."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
