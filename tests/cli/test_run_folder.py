"""A run folder over kills, damage, deletion and a second process: repaired, refused in one line, never mixed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitscope as vs
from tests.fixtures.programs.kills import Killed
from tests.fixtures.runs.run_folders import losses
from vitscope.analyses import runner
from vitscope.reproduce import trial
from vitscope.runs import run_end, run_lock
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest
from vitscope.runs.run_dir import Run
from vitscope.training import checkpoint_callback
from vitscope.training.lightning_module import Classifier

ORIGINALS = {"replace": os.replace, "fsync": os.fsync}
QUIET = ["trainer.enable_progress_bar=false", "analysis=[]", "test=false"]


@pytest.fixture
def stopped(call, tiny, tmp_path, monkeypatch) -> Path:
    """Return a run of two epochs that was killed after the first one's checkpoints."""
    folder = tmp_path / "runs" / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(run_end, "note_end", lambda *_, **__: None)
        save = checkpoint_callback.Checkpoints.on_train_epoch_end

        def killed(self, trainer, pl_module):
            save(self, trainer, pl_module)
            raise Killed

        patch.setattr(checkpoint_callback.Checkpoints, "on_train_epoch_end", killed)
        call("train", *tiny, *QUIET, "trainer.max_epochs=2", f"run_dir={folder}")
    return folder


def test_a_run_that_cannot_be_trusted_or_is_alive_is_not_joined(call, tiny, stopped, capsys) -> None:
    """One flipped bit of the manifest and ckpt_path=auto: exit 4; a living holder: exit 6. Nothing is written before."""
    again = [*tiny, *QUIET, "trainer.max_epochs=2", "ckpt_path=auto"]
    manifest = stopped / "checkpoints" / "manifest.json"
    whole = manifest.read_bytes()
    place = whole.index(b'"global_step": 4') + len(b'"global_step": ')
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file() and file != manifest}
    capsys.readouterr()
    for damaged in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], b"{}", None):
        manifest.unlink()
        if damaged is not None:
            manifest.write_bytes(damaged)
        for arguments in (again, [f"run={stopped}", "ckpt_path=auto"], [f"run={stopped}"]):
            assert call("train", *arguments) == 4
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert "manifest.json" in line
    manifest.write_bytes(whole)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {**run_lock._own_facts(), "pid": sleeper.pid, "started": run_lock._start_time(sleeper.pid)}
    try:
        (stopped / run_lock.FILE).write_text(json.dumps(facts))
        for arguments in (again, [f"run={stopped}", "ckpt_path=last"]):
            assert call("train", *arguments) == 6
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert f"process {sleeper.pid} on" in line
    finally:
        sleeper.communicate()
    assert [run.name for run in stopped.parent.iterdir()] == ["stopped"]
    unchanged = {file: content for file, content in before.items() if file.name != "log.txt"}
    assert {file: file.read_bytes() for file in unchanged} == unchanged
    assert call("train", *again) == 0
    assert "is stale and was taken over" in capsys.readouterr().err
    assert sorted(losses(stopped)) == list(range(8))
    assert not (stopped / run_lock.FILE).exists()


def test_a_folder_that_is_deleted_ends_the_training(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "runs" / "deleted"
    step = Classifier.training_step
    steps = []

    def deleting(self, batch, batch_idx):
        steps.append(batch_idx)
        if batch_idx == 1:
            shutil.rmtree(folder)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", deleting)
    assert call("train", *tiny, *QUIET, f"run_dir={folder}") == 6
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "was deleted or renamed while it trained" in line
    assert steps == [0, 1]
    assert not folder.exists()


def test_diagnostics_of_the_last_epoch_after_a_kill(call, tiny, tmp_path, monkeypatch) -> None:
    """Killed in them, the run has nothing left to train: they are made when it goes on."""
    folder = tmp_path / "run"
    options = ["analysis=[fourier]", "analysis.fourier.when.every_n_epochs=1", "analysis.fourier.probe.n_images=8"]
    with monkeypatch.context() as patch:
        patch.setattr(run_end, "note_end", lambda *_, **__: None)

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(runner, "_measured", killed)
        call("train", *tiny, *options, "test=false", "trainer.max_epochs=1", f"run_dir={folder}")
    assert not list(folder.glob("results/*/*.npz"))
    assert call("train", f"run={folder}", "ckpt_path=last") == 0
    assert set(vs.load_results(folder)["fourier"]) == {"epoch-0000", "end"}


def test_slimming_is_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint stays verified, with or without its optimizer's state; the next start drops the rest."""
    stops = 0
    while True:
        run = Run(tmp_path / str(stops))
        for name in ("init.ckpt", "best.ckpt", "last.ckpt"):
            content = {"epoch": 0, "global_step": 1, "state_dict": {}, "optimizer_states": [{"state": {}}]}
            checkpoint_io.write(content, run.checkpoints / name)
        calls = []
        with monkeypatch.context() as patch:
            for name in ORIGINALS:

                def deadly(*args, original=ORIGINALS[name], at=stops, calls=calls):
                    calls.append(None)
                    if len(calls) > at:
                        raise Killed
                    return original(*args)

                patch.setattr(os, name, deadly)
            try:
                trial.drop_optimizer_states(run)
                break
            except Killed:
                stops += 1
        for name in checkpoint_manifest.entries(run.checkpoints):
            checkpoint_io.read(run.checkpoints / name)
        trial.drop_optimizer_states(run)
        states = {
            name: checkpoint_io.read(run.checkpoints / name)["optimizer_states"] for name in ("init.ckpt", "best.ckpt")
        }
        assert states == {"init.ckpt": [], "best.ckpt": []}
        assert checkpoint_io.read(run.checkpoints / "last.ckpt")["optimizer_states"] != []
    assert stops > 10
