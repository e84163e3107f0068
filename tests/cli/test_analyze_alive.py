"""``analyze.py`` on a run that trains in another process, on one that was stopped, and twice at once on one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.programs.commands import FOURIER
from vitscope.runs import api, metrics_log, partial_results, result_store, run_dir, run_lock
from vitscope.runs.checkpoints import checkpoint_content, checkpoint_io
from vitscope.runtime import safe_files

torch.set_num_threads(1)


@pytest.fixture
def run(fourier_run: Path) -> Path:
    return fourier_run


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lock(folder: Path, age: float, **facts: object) -> None:
    (folder / run_lock.FILE).write_text(json.dumps({**run_lock._own_facts(), **facts}))
    os.utime(folder / run_lock.FILE, (time.time() - age,) * 2)


def test_a_run_that_trains_elsewhere(call, run: Path, other_process, capsys) -> None:
    """Checkpoints that the training replaces are refused, nothing is written; those that stay are measured beside it."""
    number = other_process.pid
    capsys.readouterr()
    for name, age, facts in (
        (f"process {number} on", 1e6, {"pid": number, "started": run_lock._start_time(number)}),
        ("process 7 on elsewhere", 30, {"pid": 7, "machine": "00000000", "host": "elsewhere"}),
    ):
        lock(run, age, **facts)
        before = files(run)
        for arguments in ([f"run={run}"], [f"run={run}", "ckpt=best"], [f"run={run}/checkpoints/last.ckpt"]):
            assert call("analyze", *arguments, *FOURIER, "analysis.fourier.probe.n_images=9") == 6
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert name in line
            assert "ckpt=init" in line
        assert files(run) == before
        held = (run / run_lock.FILE).read_bytes()
        assert call("analyze", f"run={run}", "ckpt=init", *FOURIER) == 0
        capsys.readouterr()
        assert (run / run_lock.FILE).read_bytes() == held
        assert set(api.load_results(run)["fourier"]) == {"init", "end"}


def test_a_stale_lock_does_not_count(call, run: Path) -> None:
    for age, facts in (
        (0, {"pid": 999_999_999}),
        (0, {"pid": os.getppid(), "started": -1}),
        (run_lock.STALE_AFTER + 60, {"machine": "00000000", "host": "elsewhere"}),
    ):
        lock(run, age, **facts)
        assert run_lock.living_holder(run) is None
    assert call("analyze", f"run={run}", *FOURIER) == 0


def test_the_end_of_a_run_that_is_not_finished(call, run: Path, capsys) -> None:
    """Its last weights are not the trained network's: their result has the name of the epoch or the step."""
    shutil.rmtree(run / "results")
    run_dir.Run(run).note(status="stopped")
    assert call("analyze", f"run={run}", *FOURIER) == 0
    assert "is not finished (stopped): the result of last.ckpt is named epoch-0000, not end" in capsys.readouterr().err
    assert set(api.load_results(run)["fourier"]) == {"epoch-0000"}
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["vitscope"]["batch"] = 2
    content.pop(checkpoint_content.CONTENT_DIGEST)
    checkpoint_io.write(content, run / "checkpoints" / "last.ckpt")
    assert call("analyze", f"run={run}", *FOURIER) == 0
    assert set(api.load_results(run)["fourier"]) == {"epoch-0000", "step-000004"}
    run_dir.Run(run).note(status="finished")
    assert call("analyze", f"run={run}", *FOURIER) == 0
    assert set(api.load_results(run)["fourier"]) == {"epoch-0000", "step-000004", "end"}


def test_two_processes_measure_one_run(call, run: Path) -> None:
    """Both end with the same numbers; each row is there once and whole, nothing temporary is left."""
    shutil.rmtree(run / "results")
    shutil.rmtree(run / "figures")
    rows = len(metrics_log.read(run / "metrics.jsonl"))
    waits, starts = os.pipe()

    def measured() -> int:
        if (child := os.fork()) == 0:
            os.close(starts)
            os.read(waits, 1)
            os._exit(call("analyze", f"run={run}", *FOURIER, "reuse=false"))
        return child

    children = [measured(), measured()]
    os.close(starts)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    (file,) = run.glob("results/fourier/*.npz")
    assert result_store.has_readable_copy(file.parent, file.stem, result_store.load(file))
    assert sorted(other.name for other in file.parent.iterdir()) == [f"{file.stem}.json", file.name]
    assert sorted(other.suffix for other in (run / "figures").iterdir()) == [".csv", ".pdf", ".png"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(metrics_log.read(run / "metrics.jsonl")) == rows  # training had measured the same


def test_one_process_deletes_the_rows_that_another_adds_to(tmp_path: Path) -> None:
    folder = tmp_path / ".partial"
    rows = partial_results.PartialRows(folder)
    rows["a"] = {"value": 1.0}
    append = safe_files.append_text
    deletions = iter([True, False])

    def deleting(path: Path, text: str) -> None:
        if next(deletions):
            shutil.rmtree(folder)
        append(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_files, "append_text", deleting)
        rows["b"] = {"value": 2.0}
    assert dict(partial_results.PartialRows(folder)) == {"b": {"value": 2.0}}
    assert dict(rows) == {"a": {"value": 1.0}, "b": {"value": 2.0}}


def test_equal_rows_of_two_processes(tmp_path: Path) -> None:
    """A row that another process adds between the look and the writing is not added again."""
    run = run_dir.Run(tmp_path)
    inside, ended = os.pipe()

    def add_once() -> int:
        with run.exclusive():
            if not metrics_log.read(run.journal):
                os.write(ended, b"1")
                time.sleep(0.05)  # longer for the other to come too early, were it not kept out
                metrics_log.Journal(run.journal).append(1, 0, {"x": 1.0})
        return 0

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            os._exit(add_once())
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    os.close(ended)
    assert os.read(inside, 8) == b"1"
    assert len(metrics_log.read(run.journal)) == 1
