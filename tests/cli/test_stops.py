"""A training that is stopped or whose disk is full saves, ends with its exit code, and is resumed to the same numbers."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import vitscope as vs
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.runs import metrics_log, result_store
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import StorageError
from vitscope.training.lightning_module import Classifier


@pytest.mark.parametrize("place", ["validation", "save"])
def test_a_stop_in_validation_or_in_a_save(call, tiny, tmp_path, monkeypatch, place) -> None:
    shared = [*tiny, "trainer.max_epochs=3", "model.drop_path=0.2", "objective=strong", "analysis=[]", "test=false"]
    assert call("train", *shared, f"run_dir={tmp_path}/whole") == 0
    seen = []
    with monkeypatch.context() as patch:
        owner, name = (Classifier, "validation_step") if place == "validation" else (checkpoint_io, "write")
        original = getattr(owner, name)

        def stopping(*args, **kwargs):
            seen.append(None)
            if len(seen) == 2:  # the second epoch's validation; the checkpoint after the first epoch
                stop_flag.request(signal.SIGTERM)
            return original(*args, **kwargs)

        patch.setattr(owner, name, stopping)
        assert call("train", *shared, f"run_dir={tmp_path}/cut") == 143
    assert len(losses(tmp_path / "cut")) < len(losses(tmp_path / "whole"))
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (checkpoint_io.read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    for key, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][key]), key


def test_a_stop_in_a_diagnostic_at_the_end(call, tiny, tmp_path, monkeypatch) -> None:
    shared = [*tiny, "analysis=[fourier]", "analysis.fourier.probe.n_images=32", "analysis.fourier.probe.batch_size=8"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "vitscope.analyses.runner.factories.probe",
            lambda *_: stop_flag.request(signal.SIGTERM) or stop_flag.check(),
        )
        assert call("train", *shared) == 143
    run = only_run(tmp_path)
    assert not list((run / "results").glob("fourier/*.npz"))
    assert call("train", f"run={run}", "ckpt_path=last") == 0
    assert vs.load_results(run)["fourier"]["end"].scalars()
    assert call("train", f"run={run}", "ckpt_path=last") == 0  # a finished one: nothing to do


def test_a_stop_in_a_diagnostic_after_an_epoch(call, tiny, tmp_path, monkeypatch) -> None:
    """It is measured when the run goes on, on the weights of that epoch."""
    sizes = ["analysis.fourier.probe.n_images=8", "analysis.fourier.when.every_n_epochs=1", "trainer.max_epochs=3"]
    shared = [*tiny, *sizes, "analysis=[fourier]", "test=false"]
    assert call("train", *shared, f"run_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "vitscope.analyses.runner.factories.probe",
            lambda *_: stop_flag.request(signal.SIGTERM) or stop_flag.check(),
        )
        assert call("train", *shared, f"run_dir={tmp_path}/cut") == 143
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    whole, cut = (vs.load_results(tmp_path / name)["fourier"] for name in ("whole", "cut"))
    assert set(whole) == set(cut) == {"epoch-0000", "epoch-0001", "epoch-0002", "end"}
    for tag, result in whole.items():
        assert result.scalars() == cut[tag].scalars()
        assert result.card == cut[tag].card


def test_a_checkpoint_of_another_model_is_refused(call, tiny, tmp_path, capsys) -> None:
    assert call("train", *tiny, "analysis=[]", "test=false", f"run_dir={tmp_path}/one") == 0
    (tmp_path / "one" / "provenance.json").write_text("{}")  # as if it were not finished
    file = tmp_path / "one" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert call("train", f"run={tmp_path}/one", f"ckpt_path={file}", "model.depth=2") in (2, 4)
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert call("analyze", f"run={file}", "analysis=[taps]", "model.depth=2") in (2, 4)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_a_disk_that_is_full_at_a_result(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    """Exit 6; the journal and the checkpoint are whole, and the run goes on when there is space."""
    write = result_store.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".npz":
            raise StorageError("paths.runs", path, "not writable (No space left on device)", "free space")
        write(path, content)

    shared = [*tiny, "analysis=[fourier]", "analysis.fourier.probe.n_images=8"]
    with monkeypatch.context() as patch:
        patch.setattr(result_store, "write_atomically", full)
        assert call("train", *shared) == 6
    assert "No space left on device" in capsys.readouterr().err
    run = only_run(tmp_path)
    assert sorted(losses(run)) == list(range(4))
    assert checkpoint_io.newest(run / "checkpoints").name == "last.ckpt"
    assert call("train", f"run={run}", "ckpt_path=last") == 0
    assert "fourier/high_frequency_last" in metrics_log.last_values(run / "metrics.jsonl")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_best_is_never_a_number_that_is_none(call, tiny, tmp_path, monkeypatch, bad) -> None:
    """A validation loss that is not finite is no best one, and the loss of training keeps the last finite checkpoint."""
    forward = Classifier.forward

    def broken(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        wrong = self.global_step > 5 or (not self.training and self.current_epoch == 0)
        return forward(self, x) * (bad if wrong else 1)

    monkeypatch.setattr(Classifier, "forward", broken)
    monitor = ["callbacks.checkpoint.monitor=val/nll", "callbacks.checkpoint.mode=min", "trainer.max_epochs=2"]
    assert call("train", *tiny, "analysis=[]", *monitor) == 5
    folder = only_run(tmp_path) / "checkpoints"
    assert not (folder / "best.ckpt").exists()
    content = checkpoint_io.read(folder / "last.ckpt")
    assert content["global_step"] == 4
    assert all(bool(torch.isfinite(value).all()) for value in content["state_dict"].values())


def test_memory_that_runs_out_in_a_diagnostic(call, tiny, tmp_path, monkeypatch) -> None:
    def starved(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("vitscope.analyses.runner._measured", starved)
    with pytest.warns(UserWarning, match="analysis.fourier failed at end: OutOfMemoryError"):
        assert call("train", *tiny, "analysis=[fourier]") == 0
    assert "test/accuracy" in metrics_log.last_values(only_run(tmp_path) / "metrics.jsonl")
