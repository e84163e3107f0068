"""Checkpoints, the metrics log and a resumed run survive a kill. Real processes; the longer cases are marked slow."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures.programs.processes import PATIENCE, ROOT, TINY, run_of, start, train_in_fork
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io


def killed_while_saving(folder: Path, megabytes: int, rounds: int, seed: int = 0, **environment: str) -> None:
    """Kill a process that saves without end, at random moments; what it said is there is there, whole."""
    draws = random.Random(seed)
    for _ in range(rounds):
        process = start(
            str(ROOT / "tests" / "fixtures" / "programs" / "survivor.py"), str(folder), str(megabytes), **environment
        )
        assert process.stdout is not None
        said = int(process.stdout.readline())
        deadline = time.monotonic() + draws.uniform(0, 0.5)
        while time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        said = max([said, *(int(line) for line in process.communicate()[0].split())])
        newest = checkpoint_io.newest(folder)
        content = checkpoint_io.read(newest)
        assert content["global_step"] >= said
        assert torch.equal(
            content["state_dict"]["w"], torch.full_like(content["state_dict"]["w"], content["global_step"])
        )
    checkpoint_io.repair(folder)
    assert not list(folder.glob(".*.tmp-*"))


@pytest.mark.slow  # tests/runs/checkpoints/test_checkpoint_io.py kills at every write
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")  # killed between file and manifest
def test_kill_9_while_saving(tmp_path: Path) -> None:
    killed_while_saving(tmp_path / "checkpoints", 4, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize("place", ["same", "other"])
def test_kill_9_while_saving_whatever_tmpdir_is(tmp_path: Path, place: str) -> None:
    shared_memory = Path("/dev/shm")
    if place == "other" and not shared_memory.is_dir():
        pytest.skip("no other file system here")
    temporary = tmp_path if place == "same" else shared_memory
    killed_while_saving(tmp_path / "checkpoints", 40, 6, TMPDIR=str(temporary))


def losses(run: Path) -> dict[int, str]:
    rows = metrics_log.read(run / "metrics.jsonl")
    return {row["step"]: float(row["train/loss"]).hex() for row in rows if "train/loss" in row}


def test_sigterm_in_a_real_process(tmp_path: Path) -> None:
    """The one guard of the signals in a real process: saved, 143, no traceback, nothing left behind."""
    arguments = [*TINY, "logger=none", "trainer.max_epochs=50", f"paths.runs={tmp_path}/runs"]
    process = train_in_fork(arguments, tmp_path / "errors.txt")
    run = run_of(tmp_path / "runs")
    process.send_signal(signal.SIGTERM)
    code, err = process.wait(60)
    assert code == 143, err
    assert "Traceback" not in err
    assert "ckpt_path=last" in err
    last = checkpoint_io.read(run / "checkpoints" / "last.ckpt")
    assert last["global_step"] == max(losses(run)) + 1
    facts = json.loads((run / "provenance.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("stopped", 143)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_resume_is_uninterrupted(tmp_path: Path, workers: int) -> None:
    shared = [*TINY, "logger=none", f"data.num_workers={workers}", "trainer.max_epochs=6", "model.drop_path=0.2",
              "trainer.limit_train_batches=6", "objective=strong", "callbacks=[checkpoint,ema]"]  # fmt: skip
    process = start("train.py", *shared, f"run_dir={tmp_path}/whole")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    for round_ in range(3):
        first = [f"run={tmp_path}/cut", "ckpt_path=last"] if round_ else [*shared, f"run_dir={tmp_path}/cut"]
        process = start("train.py", *first)
        done = -1
        while process.poll() is None and done < 8 * (round_ + 1):
            rows = (
                metrics_log.read(tmp_path / "cut" / "metrics.jsonl")
                if (tmp_path / "cut/metrics.jsonl").exists()
                else []
            )
            done = max([row["step"] for row in rows if "train/loss" in row], default=-1)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start("train.py", f"run={tmp_path}/cut", "ckpt_path=last")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_twice_interrupted_ends_at_once(tmp_path: Path) -> None:
    process = start("train.py", *TINY, "logger=none", "trainer.max_epochs=50", f"paths.runs={tmp_path}/runs")
    run_of(tmp_path / "runs")
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["wandb-core", "itself"])
def test_wandb_offline_dies_with_what_is_killed(tmp_path: Path, victim: str) -> None:
    """W&B's process killed: training goes on. All killed after some seconds: the journal has every step."""
    process = start(
        "train.py", *TINY, "trainer.max_epochs=3", "trainer.limit_train_batches=80", f"paths.runs={tmp_path}/runs"
    )
    run = run_of(tmp_path / "runs")
    if victim == "itself":
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        steps = sorted(losses(run))
        assert steps == list(range(len(steps)))
        return
    found = [p for p in Path("/proc").glob("[0-9]*") if _is_core_of(p, process.pid)]
    assert found, "no wandb-core to kill"
    for core in found:
        os.kill(int(core.name), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert len(losses(run)) == 3 * 80


def _is_core_of(process: Path, parent: int) -> bool:
    """Return whether a process is the W&B service that ``parent`` started: it is told whom to end with."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"wandb-core" in part for part in arguments[:1]) and str(parent).encode() in arguments
