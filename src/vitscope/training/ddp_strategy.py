"""DDP with a timeout, and the end of the processes of other ranks."""

from __future__ import annotations

import signal
import subprocess
from datetime import timedelta
from typing import Any

from pytorch_lightning.strategies import DDPStrategy

from vitscope.training import lightning_internals


class Ddp(DDPStrategy):
    """Lightning's DDP strategy with a timeout in seconds.

    Args:
        timeout_s: Seconds that a process waits for another one that died or hangs, before the job ends with exit code 7. It
            has to be longer than anything that one rank does alone (drawing figures, writing a checkpoint).
        **options: Keyword arguments of `DDPStrategy`.
    """

    def __init__(self, timeout_s: float = 600.0, **options: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s), **options)


def end_other_ranks(trainer: Any, timeout_s: float = 5.0) -> None:
    """Wait for the processes that Lightning started from this one, and kill those that run longer than ``timeout_s``."""
    for process in lightning_internals.child_processes(trainer):
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # the only signal that ends a stopped process
            process.wait()
