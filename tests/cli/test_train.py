"""``train.py`` from the command line to the run folder; resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import json
import signal

import pytest
import torch

import vitscope as vs
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest
from vitscope.runtime import stop_flag
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.lightning_module import Classifier


@pytest.mark.real_figures
def test_the_main_job(call, tiny, tmp_path, capsys) -> None:
    arguments = ["caps=smoke", "trainer.max_epochs=1", "analysis.hessian.probe.n_images=16"]
    assert call("train", *tiny, *arguments) == 0
    run = only_run(tmp_path)
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
        "results",
        "figures",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"init.ckpt", "last.ckpt", "best.ckpt", "manifest.json"}
    found = vs.load_results(run)
    assert set(found) == {"hessian", "landscape", "slice", "fourier"}
    card = found["hessian"]["end"].card
    assert (card.data, card.split, card.augmentation, card.weight_decay) == ("photos", "train", "crop_flip", 0.05)
    assert (run / "figures" / "fourier-end.png").stat().st_size > 1000
    assert (run / "figures" / "fourier-end.pdf").exists()
    provenance = json.loads((run / "provenance.json").read_text())
    assert (provenance["status"], provenance["exit_code"]) == ("finished", 0)
    values = metrics_log.last_values(run / "metrics.jsonl")
    names = {f"test/{name}" for name in ("loss", "nll", "accuracy", "accuracy_top5", "ece", "brier")}
    assert names | {"val/accuracy", "train/loss", "train/grad_norm", "hessian/negative_eigenvalue_proportion"} <= set(
        values
    )
    assert "lr-AdamW" in values
    assert str(run) in capsys.readouterr().out
    probe = vs.load_probe(run, n_images=8)
    assert probe.card().checkpoint == card.checkpoint
    assert call("train", f"run={run}", "ckpt_path=last") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_diagnostics_leave_no_trace_in_training(call, tiny, tmp_path) -> None:
    shared = [*tiny, "trainer.max_epochs=2", "model.drop_path=0.2", "objective=strong"]
    assert call("train", *shared, "analysis=[]", f"run_dir={tmp_path}/without") == 0
    watched = ["analysis=[fourier]", "analysis.fourier.when.every_n_epochs=1", "analysis.fourier.when.start=true"]
    sizes = ["analysis.fourier.probe.n_images=8"]
    assert call("train", *shared, *watched, *sizes, f"run_dir={tmp_path}/with") == 0
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert len(losses(tmp_path / "with")) == 8
    assert set(vs.load_results(tmp_path / "with")["fourier"]) == {"init", "epoch-0000", "epoch-0001", "end"}


@pytest.mark.parametrize(
    ("stop_after", "optimizer"),
    [
        (2, "adamw"),
        (5, "sam"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, "adamw"), (5, "adamw"), (2, "sam"), (4, "sam")]),
    ],
)
def test_resumed_equals_uninterrupted(call, tiny, tmp_path, monkeypatch, stop_after, optimizer) -> None:
    shared = [
        *tiny,
        f"optimizer={optimizer}",
        "trainer.max_epochs=3",
        "model.drop_path=0.2",
        "objective=strong",
        "analysis=[]",
        "test=false",
    ]
    assert call("train", *shared, f"run_dir={tmp_path}/whole") == 0
    begin = Classifier.on_train_batch_start
    seen = []

    def stopping(self: Classifier, batch: object, batch_idx: int) -> None:
        seen.append(batch_idx)
        if len(seen) == stop_after:
            stop_flag.request(signal.SIGTERM)
        begin(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "on_train_batch_start", stopping)
    assert call("train", *shared, f"run_dir={tmp_path}/cut") == 143
    monkeypatch.setattr(Classifier, "on_train_batch_start", begin)
    assert len(losses(tmp_path / "cut")) == stop_after
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (checkpoint_io.read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name


def test_interrupt_from_the_keyboard(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    begin = Classifier.on_train_batch_start

    def stopping(self: Classifier, batch: object, batch_idx: int) -> None:
        stop_flag.request(signal.SIGINT)
        begin(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "on_train_batch_start", stopping)
    assert call("train", *tiny, "analysis=[]") == 130
    assert checkpoint_manifest.entries(only_run(tmp_path) / "checkpoints")["last.ckpt"]["global_step"] == 1
    assert "ckpt_path=last" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    forward = Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda self, x: forward(self, x) * (float("nan") if self.global_step == 2 else 1)
    )
    assert call("train", *tiny, "analysis=[]") == 5
    err = capsys.readouterr().err
    assert "optimizer.lr" in err
    assert "loss nan at step 2" in err
    assert "Traceback" not in err
    assert "Traceback" in (only_run(tmp_path) / "log.txt").read_text()


def test_a_failing_diagnostic_does_not_stop_training(call, tiny, tmp_path, monkeypatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("vitscope.analyses.runner._measured", broken)
    with pytest.warns(
        UserWarning, match="analysis.fourier failed at end: RuntimeError: out of memory; recorded as null"
    ):
        assert call("train", *tiny, "analysis=[fourier]") == 0
    (record,) = (only_run(tmp_path) / "results" / "fourier").glob("*.json")
    assert json.loads(record.read_text())["scalars"] is None


def test_last_with_nothing_there(call, tiny, tmp_path, capsys) -> None:
    assert call("train", *tiny, "ckpt_path=last") == 4
    assert capsys.readouterr().err.startswith("error: ckpt_path=last: no unfinished run")
    assert not (tmp_path / "runs").exists()


def test_another_batch_size_is_refused_on_resume(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Checkpoints, "on_validation_batch_end", lambda *_, **__: stop_flag.check())
    begin = Classifier.on_train_batch_start

    def stopping(self: Classifier, batch: object, batch_idx: int) -> None:
        stop_flag.request(signal.SIGTERM)
        begin(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "on_train_batch_start", stopping)
    assert call("train", *tiny, "analysis=[]") == 143
    assert call("train", f"run={only_run(tmp_path)}", "data.batch_size=8") == 4
    assert "data.batch_size=8: the run was made with 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["model=alternett"], 2, "error: model=alternett: no such choice; did you mean alternet"),
        (["model.widht=3"], 2, "error: model.widht"),
        (["+model.typo=1"], 2, "error: model.typo=1: no such key"),
        (["optimizer.lr=nan"], 2, "error: optimizer.lr=nan: not a finite number"),
        (["model.window_size=7"], 2, "error: model.window_size=7"),
        (["data=cifar100", "data.root=/nowhere"], 3, "error: data.root=/nowhere"),
        (["run=/nowhere"], 4, "error: run=/nowhere"),
        (["model=[alternet"], 2, "error: "),
    ],
)
def test_bad_input_gets_one_line(call, tmp_path, capsys, monkeypatch, arguments, code, text) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    assert call("train", f"paths.runs={tmp_path}/runs", "logger=none", *arguments) == code
    err = capsys.readouterr().err.strip()
    assert err.startswith(text)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()  # no run is made, no W&B run started


def test_a_finished_run_is_not_trained_again(call, tiny, tmp_path, capsys) -> None:
    arguments = [*tiny, "analysis=[]", "test=false", "skip_finished=true", "ckpt_path=auto"]
    assert call("train", *arguments) == 0
    assert call("train", *arguments) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert call("train", *arguments, "seed=1") == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
