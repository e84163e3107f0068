"""Processes of tests: commands of vitscope, and ranks of a distributed computation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import torch.distributed
import torch.multiprocessing
from pytorch_lightning.strategies.launchers import subprocess_script

from vitscope.cli import exit_codes, train
from vitscope.runs import metrics_log

ROOT = Path(__file__).parents[2]
T = TypeVar("T")

#: s that tests wait for a process, which takes seconds on a quiet machine: only what hangs takes so long
PATIENCE = 600.0

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


class ForkedProcess:
    """A function in a forked process with its own environment, standard error and signal handlers.

    A new interpreter would take ten seconds to import the package. The methods are those of `subprocess.Popen` that tests
    and Lightning's launcher call.
    """

    def __init__(
        self, function: Callable[[], int], errors: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.errors = errors
        self._function = function
        self._environment = dict(environment)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which only wait
            self._process = torch.multiprocessing.get_context("fork").Process(target=self._run)
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def _run(self) -> None:
        os.environ.update(self._environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = self._function()
        sys.stderr.flush()
        os._exit(code)

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """Return the exit code, None if it still runs after that time, and what was written to standard error."""
        self._process.join(seconds)
        return self.poll(), self.errors.read_text()


def train_in_fork(arguments: Sequence[str], errors: Path) -> ForkedProcess:
    """Start ``train.py`` with arguments in a forked process; ranks that Lightning launches from it are forks of it."""

    def run() -> int:
        subprocess_script.subprocess = SimpleNamespace(Popen=start_rank)
        os.environ.pop("VITSCOPE_RUN_DIR", None)
        sys.modules["__main__"].__spec__ = None  # a script, not pytest's module
        sys.argv = [str(ROOT / "train.py"), *arguments]
        return exit_codes.run_command(train._command)

    def start_rank(command: list[str], env: Mapping[str, str], cwd: str | None) -> ForkedProcess:
        assert Path(command[0]).samefile(sys.executable)

        def run_rank() -> int:
            os.chdir(cwd or ".")
            sys.argv = command[1:]
            return exit_codes.run_command(train._command)

        return ForkedProcess(run_rank, errors, env)

    return ForkedProcess(run, errors)


def wait_until(
    condition: Callable[[], T], what: str, process: subprocess.Popen[str] | ForkedProcess | None = None
) -> T:
    """Wait until a condition gives a true value, and return it.

    Args:
        condition: The condition.
        what: Name of what is waited for, for the error.
        process: A process that must not end before.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE:.0f} s"
        time.sleep(0.05)
    return value


def run_of(root: Path) -> Path:
    """Return the run folder of a training once it has taken its third step."""

    def found() -> Path | None:
        for run in root.glob("*"):
            rows = run / "metrics.jsonl"
            if rows.exists() and sum("train/loss" in row for row in metrics_log.read(rows)) >= 3:
                return run
        return None

    run = wait_until(found, "run with three steps")
    assert run is not None
    return run


def on_ranks(function: Callable[..., None], *arguments: object, n: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in n processes at once and wait for them.

    They are forked: a new interpreter would take ten seconds to import the package.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which only wait
        context = torch.multiprocessing.start_processes(function, arguments, nprocs=n, join=False, start_method="fork")
    assert context is not None
    end = time.monotonic() + PATIENCE
    while not context.join(timeout=1.0):
        if time.monotonic() > end:
            for process in filter(None, context.processes):
                process.kill()
            raise TimeoutError(f"{function.__name__} hangs on {n} ranks")


def results_of_ranks(measure: Callable[[], Any], folder: Path, n: int = 2) -> list[Any]:
    """Return what ``measure`` returns on each of n ranks that meet over gloo; ``folder`` is for their files."""
    on_ranks(_save_as_rank, measure, str(folder), n, n=n)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(n)]


def _save_as_rank(rank: int, measure: Callable[[], Any], folder: str, n: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n, timeout=timedelta(seconds=PATIENCE)
    )
    torch.save(measure(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
