"""Disks that fill up and folders that are none, for real where the system lets a test: the old file stays, exit code 6."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.fixtures.programs.processes import ENVIRONMENT, ROOT, TINY
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.runs import metrics_log, run_dir, wandb_mirror
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.metrics_log import Journal
from vitscope.runtime import atomic_write, safe_files
from vitscope.runtime.errors import StorageError
from vitscope.training import checkpoint_callback


@contextmanager
def no_file_longer_than(n_bytes: int) -> Iterator[None]:
    """Let the system refuse to write beyond that length, as it refuses on a full disk: in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_io.write({"epoch": 0, "global_step": 1, "w": torch.ones(5)}, path)
    with no_file_longer_than(50_000), pytest.raises(StorageError, match=r"last\.ckpt: checkpoint not written"):
        checkpoint_io.write({"epoch": 0, "global_step": 2, "w": torch.ones(50_000)}, path)
    assert checkpoint_io.read(path)["global_step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "manifest.json"]


def test_a_row_that_does_not_fit(tmp_path: Path) -> None:
    """The row is cut in the middle; the rows before it and those after space was made are all read."""
    book = Journal(tmp_path / "metrics.jsonl")
    book.append(0, 0, {"train/loss": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_file_longer_than(size + 10), pytest.raises(StorageError, match="row not written"):
        book.append(1, 0, {"train/loss": 0.25})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
    book.append(1, 0, {"train/loss": 0.125})  # by the same process, and by another that resumes
    Journal(tmp_path / "metrics.jsonl").append(2, 0, {"train/loss": 0.0625})
    assert [row["train/loss"] for row in metrics_log.read(tmp_path / "metrics.jsonl")] == [0.5, 0.125, 0.0625]


def test_a_device_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(safe_files, "open_to_append", lambda path: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(StorageError, match="No space left on device"):
        Journal(tmp_path / "metrics.jsonl").append(0, 0, {"train/loss": 1.0})


def test_a_training_whose_second_checkpoint_does_not_fit(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    """Exit 6 in one line; the first epoch's checkpoint is whole, the journal has every step, and the run goes on later."""
    shared = [*tiny, "trainer.max_epochs=2", "analysis=[]", "test=false", "trainer.enable_progress_bar=false"]
    with monkeypatch.context() as patch, no_file_longer_than(resource.RLIM_INFINITY):
        save = checkpoint_callback.Checkpoints.on_train_epoch_end

        def full(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            save(self, trainer, pl_module)

        patch.setattr(checkpoint_callback.Checkpoints, "on_train_epoch_end", full)
        assert call("train", *shared) == 6
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    assert "checkpoint not written (File too large)" in err[0]
    run = only_run(tmp_path)
    assert sorted(losses(run)) == list(range(8))
    last = checkpoint_io.newest(run / "checkpoints")
    assert checkpoint_io.read(last)["global_step"] == 4
    assert json.loads((run / "provenance.json").read_text())["exit_code"] == 6
    assert call("train", f"run={run}", "ckpt_path=last") == 0
    assert checkpoint_io.read(run / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_why_it_ended_is_said_where_that_cannot_be_written_down(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    """A loss that is not finite on a disk that is full: exit code 5, not 6, and W&B's run is ended."""
    ended = []
    monkeypatch.setattr(wandb_mirror.WandbMirror, "finish", lambda self, code: ended.append(code))
    monkeypatch.setattr(
        "vitscope.training.lightning_module.Classifier.forward", lambda self, x: self.model(x) * float("nan")
    )
    note = run_dir.Run.note

    def full(self, **facts):
        if "exit_code" in facts:
            raise StorageError("paths.runs", self.path, "not writable (No space left on device)", "free space")
        note(self, **facts)

    monkeypatch.setattr(run_dir.Run, "note", full)
    assert call("train", *tiny, "analysis=[]") == 5
    err = capsys.readouterr().err
    assert "loss nan" in err
    assert "No space left on device" in err
    assert ended == [5]


def test_wandb_s_disk_is_full_and_ours_is_not(call, tiny, tmp_path, monkeypatch) -> None:
    """W&B may not write a byte: training ends well, and the journal has every step."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wandb.init", refused)
    arguments = [a for a in tiny if a != "logger=none"]
    assert call("train", *arguments, "analysis=[]", "test=false") == 0
    assert sorted(losses(only_run(tmp_path))) == list(range(4))


@pytest.mark.parametrize("place", ["runs/x", "data"])
def test_a_file_in_place_of_a_folder_is_found_before_training(call, tiny, tmp_path, capsys, place) -> None:
    (tmp_path / "file").write_text("")
    key, code = ("paths.runs", 6) if place == "runs/x" else ("data.root", 3)
    base = [argument for argument in tiny if not argument.startswith(key)]
    data = ["data=cifar10"] if key == "data.root" else []
    assert call("train", *base, *data, f"{key}={tmp_path}/file/{place}") == code
    assert capsys.readouterr().err.startswith(f"error: {key}=")
    assert not (tmp_path / "runs").exists()


def test_a_run_s_folder_that_became_read_only(call, trained, tmp_path, capsys) -> None:
    """Going on with a run whose checkpoints cannot be written: exit 6 and not a step (root may write anywhere: a file is
    in the folder's place)."""
    run = trained("analysis=[]", "test=false")
    run_dir.Run(run).note(status="stopped")
    kept = (run / "checkpoints").rename(tmp_path / "kept")
    (run / "checkpoints").write_text("")
    capsys.readouterr()
    before = losses(run)
    assert call("train", f"run={run}", f"ckpt_path={kept}/last.ckpt", "trainer.max_epochs=2") == 6
    assert capsys.readouterr().err == f"error: run={run}: not writable; give it write permission, or start a new run\n"
    assert losses(run) == before


def test_a_result_that_does_not_fit(tmp_path: Path) -> None:
    atomic_write.write_atomically(tmp_path / "a.npz", b"old")
    with no_file_longer_than(1000), pytest.raises(StorageError, match="File too large"):
        atomic_write.write_atomically(tmp_path / "a.npz", bytes(2000))
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 24 MB and a training that keeps every epoch: exit 6, what is there is whole, and it goes on elsewhere
    once there is space. W&B writes to the same disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        epochs = [
            "trainer.max_epochs=40",
            "trainer.limit_train_batches=4",
            "callbacks.checkpoint.snapshots=[1,2,3,4,5,6,7,8,9]",
        ]
        command = [sys.executable, "train.py", *TINY, *epochs, f"paths.runs={disk}/runs"]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 6, done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        (run,) = (disk / "runs").iterdir()
        newest = checkpoint_io.newest(run / "checkpoints")
        step = checkpoint_io.read(newest)["global_step"]
        assert step >= 4
        assert sorted(losses(run)) == list(range(max(losses(run)) + 1))
        assert max(losses(run)) + 1 >= step
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        command = [sys.executable, "train.py", f"run={run}", "ckpt_path=last"]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert sorted(losses(run)) == list(range(160))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
