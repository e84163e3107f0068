"""Child processes of a sweep: where each runs, how it is stopped, and what its result files say of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vitscope.config import loading
from vitscope.runtime import safe_files
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.text_layout import count_text

#: file of what a child prints, in the folder of its run
OUTPUT = "output.txt"
#: seconds that a child which was asked to stop may take to save
GRACE = 120.0

#: environment variables that a parent process sets for itself and its children must not inherit
_PRIVATE = re.compile(
    r"RANK|LOCAL_RANK|NODE_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|ROLE_NAME"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|PL_.*|SLURM_(PROCID|LOCALID|NTASKS|NTASKS_PER_NODE|STEP_.*)|VITSCOPE_RUN_DIR"
    r"|HYDRA_FULL_ERROR"
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Slot:
    """A place where one trial runs at a time: a GPU (or several, ``0+1``), or a share of the CPU's cores."""

    name: str
    environment: Mapping[str, str]


class JobProcess(Protocol):
    """A process, here or on another machine, as the scheduler handles it."""

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while it runs."""
        ...

    def send_signal(self, sig: int, /) -> None:
        """Send a signal."""
        ...

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: It still runs after that time.
        """
        ...

    def kill_all(self) -> None:
        """Kill it with all its own children."""
        ...


class ChildProcess(subprocess.Popen[bytes]):
    """A child in a session of its own."""

    def kill_all(self) -> None:
        """Kill it with all its own children."""
        os.killpg(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """State of a run from the files of its folder: the state of ``provenance.json`` and its exit code."""

    status: str | None
    exit_code: int | None

    @property
    def finished(self) -> bool:
        """Whether the run says that it is complete."""
        return self.status == "finished" and self.exit_code in (0, None)


def slots(gpus: str | None, jobs: int | None) -> list[Slot]:
    """Return the slots of ``GPUS=0,1`` or ``JOBS=2`` (one job on whatever is here by default).

    A slot's threads are its share of the cores this process may use, and never more than the caller asked for.

    Raises:
        ConfigError: Both given, or names that are no GPUs.
    """
    if gpus is not None and jobs is not None:
        raise ConfigError("JOBS", jobs, "GPUS is given too", "give one of them")
    if gpus is None:
        n = 1 if jobs is None else jobs
        if n < 1:
            raise ConfigError("JOBS", jobs, "not a whole number from 1", "give the number of trials side by side")
        # a single job may use a GPU that is here; several side by side would share it
        pinned = {} if jobs is None else {"CUDA_VISIBLE_DEVICES": ""}
        return [Slot(f"cpu{i}" if jobs is not None else "here", {**pinned, **threads(n)}) for i in range(n)]
    names = gpus.split(",")
    for name in names:
        if not re.fullmatch(r"(\d+|(GPU|MIG)-[\w/-]+)(\+\d+)*", name) or names.count(name) > 1:
            raise ConfigError("GPUS", gpus, "not a list of different GPUs", "write GPUS=0,1 (0+1 for a trial on two)")
    return [
        Slot(f"gpu{name}", {"CUDA_VISIBLE_DEVICES": name.replace("+", ","), **threads(len(names))}) for name in names
    ]


def check_gpus(gpus: str | None) -> None:
    """Refuse GPU numbers that this machine does not have.

    Raises:
        ConfigError: Naming how many there are.
    """
    if gpus is None:
        return
    import torch

    n_gpus = torch.cuda.device_count()
    gpu_numbers = [int(number) for number in re.findall(r"(?<![\w-])\d+", gpus)]
    if n_gpus == 0 or any(number >= n_gpus for number in gpu_numbers):
        present_gpus = count_text(n_gpus, "GPU") if n_gpus else "no GPUs"
        raise ConfigError("GPUS", gpus, f"this machine has {present_gpus}", "use JOBS=n for the CPU")


def threads(n: int) -> dict[str, str]:
    """Return the variables that give one of ``n`` processes its share of the cores, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // n)
    user_settings = {name: os.environ.get(name, "") for name in THREAD_VARIABLES}
    return {
        name: str(min(share, int(value)) if value.isdigit() and int(value) else share)
        for name, value in user_settings.items()
    }


def is_private(name: str) -> bool:
    """Tell whether an environment variable belongs to one process and must not reach its children."""
    return _PRIVATE.fullmatch(name) is not None


def shared_slots(gpus: str, jobs: int) -> list[Slot]:
    """Return ``jobs`` slots on GPUs that jobs share in turn: ``gpus=0,1 jobs=4`` is two jobs on each.

    Raises:
        ConfigError: Fewer jobs than GPUs, or names that are no GPUs.
    """
    single = slots(gpus, None)
    if jobs < len(single):
        raise ConfigError(
            "JOBS", jobs, f"fewer than the {len(single)} GPUs", f"give {len(single)} or more, or leave it out"
        )
    if jobs == len(single):
        return single
    shares = threads(jobs)
    return [
        Slot(f"{single[i % len(single)].name}.{i // len(single)}", {**single[i % len(single)].environment, **shares})
        for i in range(jobs)
    ]


def environment(slot: Slot | None = None, **more: str) -> dict[str, str]:
    """Return a child's environment: this one without what belongs to this process, pinned to a slot."""
    variables = {key: value for key, value in os.environ.items() if not is_private(key)}
    return {**variables, **(slot.environment if slot else {}), **more}


def training(program: Sequence[str], arguments: Sequence[str], folder: Path) -> list[str]:
    """Return the command that begins a run in ``folder``, or goes on with the one that was begun there."""
    if (folder / "config.yaml").is_file() and (folder / "provenance.json").is_file():
        return [*program, f"run={folder}", "ckpt_path=auto"]  # with its own configuration
    (folder / "config.yaml").unlink(missing_ok=True)  # a kill between the two files
    return [*program, *arguments, loading.path_override("run_dir", folder)]


def train_program() -> list[str]:
    """Return the command that trains: the checkout's ``train.py``, else the installed package's."""
    script = loading.folder().parent / "train.py"  # Lightning starts ranks by the script's path, which a module lacks
    return [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "vitscope", "train"]


def start(command: Sequence[str], env: Mapping[str, str], log: Path | None) -> ChildProcess:
    """Start a child in a session of its own, so that Ctrl-C in the terminal reaches only us and is passed on once.

    Its output goes to ``log`` (appended), or where ours goes. It gets SIGTERM should we be killed.
    """
    tied = [sys.executable, "-m", "vitscope.sweep.parent_death", str(os.getpid()), *command]
    if log is None:
        return ChildProcess(tied, env=dict(env), stdin=subprocess.DEVNULL, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(safe_files.open_to_append(log), "ab") as file:
        return ChildProcess(
            tied, env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop(processes: Iterable[JobProcess], signum: int, grace: float = GRACE) -> None:
    """Pass a signal on, wait until the children have saved, and kill what is left with all its own children."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.send_signal(signum)
    deadline = time.monotonic() + grace
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill_all()
            process.wait()


def exit_code(process: JobProcess) -> int | None:
    """Return a child's exit code as a shell gives it (128 + signal for a killed one), None while it runs."""
    code = process.poll()
    return code if code is None or code >= 0 else 128 - code


def outcome(folder: Path) -> Outcome:
    """Read what a run folder says of its run."""
    try:
        facts: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError):
        return Outcome(None, None)
    return Outcome(facts.get("status"), facts.get("exit_code"))


def last_error(log: Path) -> str:
    """Return the last line of a child's output that says what went wrong, else its last line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if re.match(r"(error:|stopped by|\w*(Error|Exception)\b)", line)]
    return (errors or lines or [""])[-1][:300]
