"""Jobs in forked processes: output, environment, exit codes and signals; and the scheduler's slots."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.programs import job_functions
from tests.fixtures.programs.processes import wait_until
from vitscope.cli import reproduce_job
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import job_scheduler, trial_process
from vitscope.sweep.forked_job import ForkedJob
from vitscope.sweep.trial_process import JobProcess, Slot

ROOT = Path(__file__).parents[2]


def test_a_job_has_its_own_output_environment_and_session(tmp_path: Path) -> None:
    output = tmp_path / "job" / "output.txt"
    job = ForkedJob(
        job_functions.told, (tmp_path,), {"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}, output, job_functions.IMPORTS
    )
    assert job.wait(60) == 3
    assert output.read_text() == "hello from the job\n"
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == {"gpu": "3", "home": None, "session": True}


def test_a_job_gets_signals_and_is_waited_for(tmp_path: Path) -> None:
    job = ForkedJob(
        job_functions.until_told, (tmp_path,), dict(os.environ), tmp_path / "output.txt", job_functions.IMPORTS
    )
    wait_until((tmp_path / "ready").exists, "job")
    assert job.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(0.01)
    trial_process.stop([job], signal.SIGTERM)
    assert trial_process.exit_code(job) == 143
    killed = ForkedJob(
        job_functions.until_told, (tmp_path,), dict(os.environ), tmp_path / "output.txt", job_functions.IMPORTS
    )
    killed.kill_all()
    killed.wait(60)
    assert trial_process.exit_code(killed) == 137


@pytest.mark.slow  # a new interpreter imports torch
def test_the_server_of_jobs_imports_without_cuda_and_without_threads_of_python() -> None:
    """A CUDA context or a running thread would not survive the fork."""
    script = (
        "import importlib, threading, torch\n"
        "def forbidden(*_, **__): raise AssertionError('CUDA is asked for while modules are imported')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = forbidden\n"
        f"[importlib.import_module(name) for name in {reproduce_job.IMPORTS!r}]\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


class Jobs:
    """Numbers as jobs; an odd one waits until no even one runs."""

    def __init__(self, numbers: list[int]) -> None:
        self.waiting, self.running, self.most = numbers, set[int](), 0
        self.slots: dict[int, str] = {}

    def next_job(self) -> int | None:
        ready = [n for n in self.waiting if n % 2 == 0 or not any(r % 2 == 0 for r in self.running)]
        if not ready:
            return None
        self.waiting.remove(ready[0])
        return ready[0]

    def start(self, job: int, slot: Slot, /) -> JobProcess:
        self.running.add(job)
        self.most = max(self.most, len(self.running))
        self.slots[job] = slot.name
        return trial_process.start(["true"], dict(os.environ), None)

    def end(self, job: int, process: JobProcess, /, stopping: bool) -> None:
        assert process.poll() == 0
        assert not stopping
        self.running.remove(job)

    def watch(self) -> None: ...

    def ended_elsewhere(self) -> list[int]:
        return []

    def waits_for_others(self) -> bool:
        return False


def test_jobs_that_have_to_wait_start_once_they_can() -> None:
    jobs = Jobs([0, 1, 2, 3])
    ended = list(job_scheduler.run_jobs(jobs, trial_process.slots(None, 2)))
    assert sorted(ended) == [0, 1, 2, 3]
    assert set(ended[:2]) == {0, 2}
    assert jobs.most == 2
    assert set(jobs.slots.values()) == {"cpu0", "cpu1"}


def test_several_jobs_share_gpus_in_turn() -> None:
    slots = trial_process.shared_slots("0,1", 4)
    assert [slot.name for slot in slots] == ["gpu0.0", "gpu1.0", "gpu0.1", "gpu1.1"]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0", "1"]
    assert trial_process.shared_slots("0,1", 2) == trial_process.slots("0,1", None)
    with pytest.raises(ConfigError, match="JOBS=1: fewer than the 2 GPUs; give 2 or more"):
        trial_process.shared_slots("0,1", 1)
