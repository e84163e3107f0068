"""Processes of tests: commands of vitscope, and ranks of a distributed computation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing

from vitscope.runs import metrics_log

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}  # fmt: skip


TINY = ["model=vit", "model.depth=1", "model.patch_size=8", "analysis=[]", "test=false", "data.batch_size=16",
        "trainer.accelerator=cpu", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1"]  # fmt: skip


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_of(root: Path, seconds: float = 60.0) -> Path:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for run in root.glob("*"):
            rows = run / "metrics.jsonl"
            if rows.exists() and sum("train/loss" in row for row in metrics_log.read(rows)) >= 3:
                return run
        time.sleep(0.05)
    raise AssertionError("no run took its third step in time")


def on_ranks(function: Callable[..., None], *arguments: object, n: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in n processes at once and wait for them.

    They are forked: a new interpreter would take ten seconds to import the package.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which only wait
        torch.multiprocessing.start_processes(function, arguments, nprocs=n, start_method="fork")
