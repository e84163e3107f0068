"""One training a run folder: a lock with host, process and heartbeat; what is stale is taken over, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.fixtures.programs.kills import KILLED, at_every_change
from vitscope.runs import run_dir, run_lock
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write
from vitscope.runtime.errors import ConfigError, StorageError

torch.set_num_threads(1)


def cfg(folder: Path) -> DictConfig:
    return OmegaConf.create({"paths": {"runs": str(folder.parent)}, "seed": 1, "run_dir": str(folder)})


def lock(folder: Path, age: float = 0.0, **facts: object) -> str:
    """Write a lock of somebody else, its last heartbeat that many seconds ago."""
    text = json.dumps({**run_lock._own_facts(), **facts})
    (folder / run_lock.FILE).write_text(text)
    os.utime(folder / run_lock.FILE, (time.time() - age,) * 2)
    return text


def taken(folder: Path) -> bool:
    with run_lock.released_at_end():
        run_lock.acquire(folder)
        return True


def test_a_living_holder_is_named(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        text = lock(tmp_path, 1e6, pid=sleeper.pid, started=run_lock._start_time(sleeper.pid))
        with pytest.raises(StorageError, match=rf"process {sleeper.pid} on .* trains in this folder") as caught:
            taken(tmp_path)
        assert caught.value.exit_code == 6
        assert [file.name for file in tmp_path.iterdir()] == [run_lock.FILE]
        assert (tmp_path / run_lock.FILE).read_text() == text
    finally:
        sleeper.communicate()
    assert taken(tmp_path)  # it has ended


def test_what_is_stale_is_taken_over_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for facts, age in (
        ({"pid": 999_999_999}, 0),  # dead
        ({"pid": os.getppid(), "started": -1}, 0),  # another process has its number
        ({}, 0),  # this process, which does not hold it: killed and started again with the same number
        ({"machine": "00000000", "host": "elsewhere"}, run_lock.STALE_AFTER + 60),
    ):
        lock(tmp_path, age, **facts)
        assert taken(tmp_path)
        assert "is stale and was taken over" in caplog.text
        caplog.clear()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\x00"])
def test_another_machine_s_heartbeat_counts(tmp_path: Path, text: str | None) -> None:
    """So does that of a lock which names nobody."""
    lock(tmp_path, 30, machine="00000000", host="elsewhere", pid=999_999_999)
    if text is not None:
        (tmp_path / run_lock.FILE).write_text(text)
    with pytest.raises(StorageError, match="on elsewhere trains" if text is None else "unknown host trains"):
        taken(tmp_path)


def test_one_of_many_takes_a_stale_lock(tmp_path: Path) -> None:
    lock(tmp_path, pid=999_999_999)
    answers, answer = os.pipe()
    held, ended = os.pipe()
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            os.close(ended)
            try:
                run_lock.acquire(tmp_path)
                os.write(answer, b"0")
            except StorageError:
                os.write(answer, b"6")
            os.read(held, 1)  # until all have answered
            os._exit(0)
        children.append(child)
    received = b"".join(os.read(answers, 1) for _ in children)
    os.close(ended)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(received) == sorted(b"06666666")


def test_the_heartbeat_renews_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.01)
    with run_lock.released_at_end():
        run_lock.acquire(tmp_path)
        os.utime(tmp_path / run_lock.FILE, (0, 0))
        for _ in range(1000):
            if (tmp_path / run_lock.FILE).stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert (tmp_path / run_lock.FILE).stat().st_mtime > 0


def test_a_folder_that_is_gone_or_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with run_lock.released_at_end():
        run_lock.acquire(folder)
        run_lock.check(folder)
        lock(folder, host="elsewhere", pid=7)
        with pytest.raises(StorageError, match="process 7 on elsewhere took it over"):
            run_lock.check(folder)
        (folder / run_lock.FILE).unlink()
        folder.rmdir()
        with pytest.raises(StorageError, match="was deleted or renamed while it trained") as caught:
            run_lock.check(folder)
        assert caught.value.exit_code == 6
        with pytest.raises(StorageError, match="no such folder"):
            Run(folder).note(status="failed")
    assert not folder.exists()


def test_a_second_run_in_one_folder_is_refused_before_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_lock.released_at_end():
        run_dir.create(cfg(folder), "train")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        for second in (
            lambda: run_dir.create(cfg(folder), "train"),
            lambda: run_dir.reopen(Run(folder), cfg(folder), "train"),
        ):
            with pytest.raises(StorageError, match=f"process {os.getpid()} on"):
                second()
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="already holds a run"):
        run_dir.create(cfg(folder), "train")


def test_a_new_run_is_killed_at_every_write(tmp_path: Path) -> None:
    """The folder can be used again: by the same command, or by name where it became a run."""

    def prepared(n: int) -> Path:
        return tmp_path / str(n)

    stops = 0
    for folder, code in at_every_change(prepared, lambda folder: run_dir.create(cfg(folder), "train")):
        assert code == KILLED
        with run_lock.released_at_end():
            if (folder / "provenance.json").exists():
                run_dir.reopen(run_dir.find(folder), cfg(folder), "train")
            else:
                run_dir.create(cfg(folder), "train")
        assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "provenance.json"]
        assert Run(folder).provenance()["status"] == "running"
        stops += 1
    assert stops > 5


def test_stale_temporary_files_are_swept_when_a_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_lock.released_at_end():
        run = run_dir.create(cfg(folder), "train")
    checkpoint_io.write({"epoch": 0, "global_step": 1, "w": torch.ones(2)}, run.checkpoints / "last.ckpt")
    stale = []
    for place in (folder, run.results / "hessian", run.figures, run.checkpoints):
        place.mkdir(parents=True, exist_ok=True)
        stale.append(place / f".x.json.tmp-{atomic_write.host_identity()}-999999999")
    mine = run.results / "hessian" / f".x.json.tmp-{atomic_write.host_identity()}-{os.getpid()}"
    for file in (*stale, mine):
        file.write_text("")
    with run_lock.released_at_end():
        run_dir.reopen(run, cfg(folder), "train")
    assert [file for file in stale if file.exists()] == []
    assert mine.exists()
