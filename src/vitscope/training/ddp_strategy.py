"""Several processes of one training: how long one waits for another, and that none is left behind."""

from __future__ import annotations

import signal
import subprocess
from datetime import timedelta
from typing import Any

from pytorch_lightning.strategies import DDPStrategy


class Ddp(DDPStrategy):
    """Lightning's DDP with a stated patience.

    Args:
        timeout_s: seconds that a process waits for another, which died or hangs, before the job ends with exit code 7;
            longer than the longest thing that one rank does by itself (drawing figures, writing a checkpoint).
        options: of `DDPStrategy`.
    """

    def __init__(self, timeout_s: float = 600.0, **options: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s), **options)


def end_others(trainer: Any, patience_s: float = 5.0) -> None:
    """Let the processes that Lightning started from this one end; kill those that have not after ``patience_s``."""
    launcher = getattr(trainer.strategy, "launcher", None)
    for process in getattr(launcher, "procs", None) or []:
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # a stopped process answers to nothing else
            process.wait()
