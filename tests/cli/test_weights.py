"""Weights from files on the command line: the official code's, anybody's, and such as nobody should open."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import vitscope as vs
from tests.fixtures.oracles import official_layout
from tests.fixtures.runs.run_folders import only_run
from vitscope import models
from vitscope.config import factories
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError

EVALUATE = ["data=digits", "analysis=[evaluation]", "analysis.evaluation.probe.n_images=12", "device=cpu"]
RESNET = ["model=convnet", "model.depth=18"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of a ResNet-18 for ten classes under the official code's key names, as its training script saves them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in official_layout.keys("resnet", 18, "cifar", (0, 0, 0, 0), 4):
        value = 0.05 * torch.randn(tuple(shape), generator=generator)
        is_norm = name.endswith(("running_var", "weight")) and len(shape) == 1
        state[name] = torch.tensor(0) if name.endswith("num_batches_tracked") else value + is_norm
    path = tmp_path / "resnet_18_cifar10.pth.tar"
    torch.save({"epoch": 305, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}, path)
    return path


def loaded(file: Path) -> torch.nn.Module:
    return models.load_official_state_dict(models.convnet(18), torch.load(file, weights_only=True)).eval()


def test_an_official_file_is_analyzed(call, file, tmp_path) -> None:
    assert call("analyze", *RESNET, *EVALUATE, f"ckpt_path={file}", f"paths.runs={tmp_path}/runs") == 0
    (result,) = vs.load_results(only_run(tmp_path))["evaluation"].values()
    cfg = only_run(tmp_path) / "config.yaml"
    data = factories.data(OmegaConf.load(cfg))
    ((x, y),) = data.probe_batches("test", n_images=12, seed=0, batch_size=12)
    with torch.no_grad():
        logits = loaded(file)(x)
    assert result.accuracy == (logits.argmax(1) == y).double().mean().item()
    assert result.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)  # float32 logits


def test_training_starts_from_an_official_file(call, file, tiny, tmp_path) -> None:
    # SGD: checkpoints of this model with AdamW's state take longer to write than the training takes
    small = ["data=digits", "data.batch_size=2", "data.eval_batch_size=2", "trainer.max_epochs=1",
             "trainer.limit_train_batches=1", "analysis=[]", "test=false", "optimizer=sgd"]  # fmt: skip
    assert call("train", *tiny[3:], *RESNET, *small, f"ckpt_path={file}") == 0
    init = checkpoint_weights.model_state(checkpoint_io.read(only_run(tmp_path) / "checkpoints" / "init.ckpt"))
    expected = loaded(file).state_dict()
    assert set(init) == set(expected)
    assert all(torch.equal(init[name], value) for name, value in expected.items())


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_a_file_of_another_model_is_one_line(call, file, tmp_path, capsys, command) -> None:
    where = f"paths.runs={tmp_path}/runs"
    assert call(command, *RESNET, "data=photos", f"ckpt_path={file}", where) == 4
    err = capsys.readouterr().err.strip()
    assert f"error: ckpt_path={file}: fc.weight has shape (10, 512) in the checkpoint, the model needs (16, 512)" in err
    assert call(command, "model=vit", "model.depth=1", "data=digits", f"ckpt_path={file}", where) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert call(command, *RESNET, "data=digits", f"ckpt_path={tmp_path}/none.pth.tar", where) == 4
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_a_malicious_file_is_refused_and_not_executed(call, tmp_path, capsys, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Attack()}, "zip.pth.tar")
    Path("bare.pth.tar").write_bytes(pickle.dumps({"state_dict": Attack()}))
    for name in ("zip", "bare"):
        assert call(command, *RESNET, "data=digits", f"ckpt_path={name}.pth.tar", f"paths.runs={tmp_path}/runs") == 4
        err = capsys.readouterr().err.strip()
        assert err.startswith(f"error: ckpt_path={name}.pth.tar: not a safe checkpoint")
        assert len(err.splitlines()) == 1
    assert not Path("executed").exists()
    assert not Path("runs").exists()


@pytest.mark.slow  # gradients are compared in tests/models/test_families.py
def test_gradient_checkpointing_and_channels_last_train_the_same_network(call, tiny, tmp_path) -> None:
    # SGD: checkpoints of this model with AdamW's state take longer to write than the training takes
    shared = [*tiny[3:], "model=alternet", "data=digits", "data.eval_batch_size=2", "trainer.limit_train_batches=2",
              "data.batch_size=2", "trainer.max_epochs=1", "analysis=[]", "test=false", "model.drop_path=0.2",
              "trainer.precision=64-true", "optimizer=sgd"]  # fmt: skip
    options = {"plain": [], "saving": ["model.grad_checkpointing=true", "channels_last=true"]}
    states = {}
    for name, option in options.items():
        assert call("train", *shared, *option, f"run_dir={tmp_path}/{name}") == 0
        states[name] = checkpoint_weights.model_state(checkpoint_io.read(tmp_path / name / "checkpoints" / "last.ckpt"))
    # in float64 a gradient of size 10 summed over 1e4 terms in another order rounds to 1e4 * 2.2e-16 * 10; two steps of rate
    # 0.1 with momentum 0.9 add it up 2.9 times. A wrong gradient, or other dropped paths, move weights by 1e-4 and more.
    bound = 2.9 * 0.1 * 1e4 * torch.finfo(torch.float64).eps * 10
    for name, value in states["plain"].items():
        assert value.dtype in (torch.float64, torch.int64), name
        assert states["saving"][name].is_contiguous()
        assert (states["saving"][name] - value).abs().max() <= bound, name  # running statistics too


def test_a_run_s_file_without_its_run(call, trained, tiny, tmp_path, capsys) -> None:
    """What a new run takes from it is said; a file of another model, or without a step left, leads to the run."""
    run = trained("analysis=[]", "test=false", "trainer.max_epochs=1")
    file = run / "checkpoints" / "last.ckpt"
    options = [*tiny, "analysis=[]", "test=false", f"ckpt_path={file}"]
    capsys.readouterr()
    assert call("train", *options, "model.patch_size=16", "trainer.max_epochs=2") == 4
    err = capsys.readouterr().err.strip()
    assert err.endswith(f"; the file belongs to a run: use run={run}, which takes that run's model and data")
    assert len(err.splitlines()) == 1
    assert call("analyze", "model=vit", "model.depth=2", f"ckpt_path={file}", f"paths.runs={tmp_path}/runs") == 4
    assert f"use run={run}, which takes" in capsys.readouterr().err
    assert call("train", *options, "trainer.max_epochs=1") == 2
    err = capsys.readouterr().err
    assert f"trainer.max_epochs=1: no training step is left: ckpt_path={file} holds a training of 4 steps" in err
    assert f"run={run} resumes that run itself, ckpt_weights_only=true starts a new training" in err
    assert [run] == list((tmp_path / "runs").iterdir())
    assert call("train", *options, "trainer.max_epochs=2", f"run_dir={tmp_path}/new") == 0
    err = capsys.readouterr().err
    assert (
        f"a new run continues from step 4 with the optimizer's state; run={run} resumes that run itself, ckpt_weig"
        in err
    )


def test_training_starts_from_averages(call, tiny, tmp_path, capsys) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(vs.models.vit("tiny", 16, 32, 8, depth=1).state_dict())
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": states[0], "state_dict_ema": states[1], "metric": np.float64(71.5)}, file)
    options = [*tiny, "analysis=[]", "test=false", "trainer.max_epochs=1"]
    for ckpt, state in (("ema", states[1]), ("last", states[0])):
        assert call("train", *options, f"ckpt_path={file}", f"ckpt={ckpt}", f"run_dir={tmp_path}/{ckpt}") == 0
        init = checkpoint_weights.model_state(checkpoint_io.read(tmp_path / ckpt / "checkpoints" / "init.ckpt"))
        assert all(torch.equal(init[name], value) for name, value in state.items())
    started = Run(tmp_path / "ema").provenance()["started_from"]
    assert started == {"checkpoint": str(file), "step": 0, "weights_only": True, "averages": True}
    capsys.readouterr()
    run = tmp_path / "ema"
    for arguments, text in (
        (
            [*options, "ckpt=ema"],
            "error: ckpt=ema: loads the averages of the file in ckpt_path, but ckpt_path names no file",
        ),
        (
            [*options, f"ckpt_path={file}", "ckpt=best"],
            "error: ckpt=best: no weights of a file that a training starts",
        ),
        (
            [f"run={run}", f"ckpt_path={file}", "ckpt=ema"],
            "error: ckpt=ema: a resumed run needs the weights that its",
        ),
    ):
        assert call("train", *arguments) == 2
        assert text in capsys.readouterr().err
    assert call("train", f"run={run}", "trainer.max_epochs=2") == 0  # from its own checkpoint, not from the file
    steps = [row["step"] for row in metrics_log.read(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert Run(run).provenance()["started_from"] == started


@pytest.mark.slow
def test_training_starts_with_a_new_classifier(call, trained, tiny, tmp_path, capsys) -> None:
    """Fine-tuning to other classes: refused with the key to set; then all weights but the classifier's are the file's."""
    run = trained("analysis=[]", "test=false", "trainer.max_epochs=1")
    file = run / "checkpoints" / "last.ckpt"
    options = [*tiny, "analysis=[]", "test=false", f"ckpt_path={file}", "data=shapes", "trainer.max_epochs=1"]
    capsys.readouterr()
    assert call("train", *options) == 4
    assert "; ckpt_head=new trains a new classifier for 8 classes; or use" in capsys.readouterr().err
    assert call("train", *options, "ckpt_head=fresh") == 2
    assert "error: ckpt_head=fresh: neither file nor new; set ckpt_head=new" in capsys.readouterr().err
    assert call("train", *tiny, "ckpt_head=new") == 2
    assert "but ckpt_path names no file; set ckpt_path=<file>" in capsys.readouterr().err
    assert call("train", *options, "ckpt_head=new", f"run_dir={tmp_path}/tuned") == 0
    err = capsys.readouterr().err
    assert err.count("new classifier for 8 classes (head.weight, head.bias); left out model.head.weight (16, ") == 1
    source = checkpoint_weights.model_state(checkpoint_io.read(file))
    start = checkpoint_weights.model_state(checkpoint_io.read(tmp_path / "tuned" / "checkpoints" / "init.ckpt"))
    assert start["head.weight"].shape[0] == 8
    assert all(start[name].equal(value) for name, value in source.items() if not name.startswith("head."))
    tuned = Run(tmp_path / "tuned")
    assert tuned.provenance()["started_from"] == {
        "checkpoint": str(file), "step": 0, "weights_only": True, "new_head": True
    }  # fmt: skip
    assert call("train", f"run={tuned.path}", "trainer.max_epochs=2") == 0  # resumes its own checkpoint
    assert metrics_log.last_values(tuned.journal)["step"] == 7
    assert call("train", f"run={tuned.path}", "ckpt_head=new", "trainer.max_epochs=3") == 2


def test_a_folder_of_a_measured_file_is_measured_again(call, tmp_path, capsys) -> None:
    """The network was a new one with random weights once, in silence."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(vs.models.vit("tiny", 10, 32, 8, depth=1).state_dict())
    file, folder = tmp_path / "net.pth", tmp_path / "measured"
    torch.save({"model": states[0], "model_ema": states[1]}, file)
    options = ["model=vit", "model.depth=1", "model.patch_size=8", *EVALUATE]
    assert call("analyze", *options, f"ckpt_path={file}", "ckpt=ema", f"run_dir={folder}") == 0
    again = ["analysis=[evaluation,taps]", "reuse=false", "device=cpu", "analysis.evaluation.probe.n_images=12"]
    before = {name: result.nll for name, result in vs.load_results(folder)["evaluation"].items()}
    assert call("analyze", f"run={folder}", *again) == 0
    assert {name: result.nll for name, result in vs.load_results(folder)["evaluation"].items()} == before
    assert list(before) == ["net-ema"]
    assert list(vs.load_results(folder)["taps"]) == ["net-ema"]
    probe = vs.load_probe(folder)
    assert all(torch.equal(value, states[1][name]) for name, value in probe.model.state_dict().items())
    capsys.readouterr()
    assert call("analyze", f"run={folder}", f"ckpt_path={file}", *again) == 2
    assert f"error: ckpt_path={file}: run={folder} names the weights already; " in capsys.readouterr().err
    torch.save({"model": states[1], "model_ema": states[0]}, file)
    assert call("analyze", f"run={folder}", *again) == 4
    assert "holds results of other weights of this file (evaluation/net-ema-" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="it was replaced since"):
        vs.load_probe(folder)
    for ckpt in ("best", "epoch-0000"):
        assert call("analyze", f"run={folder}", f"ckpt={ckpt}", *again) == 4
        assert "holds results of one file" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="holds results of one file"):
            vs.load_probe(folder, ckpt=ckpt)
    file.unlink()
    assert call("analyze", f"run={folder}", *again) == 4
    assert f"ckpt_path={file}: {folder} measured this file, and it is no longer there" in capsys.readouterr().err


def test_values_that_an_analysis_would_pass_over_are_refused(call, trained, capsys) -> None:
    run = trained("analysis=[]", "test=false", "trainer.max_epochs=1")
    measured = ["analysis=[evaluation]", "analysis.evaluation.probe.n_images=8", "device=cpu"]
    for override, code, text in (
        (
            "optimizer.lr=3",
            2,
            "error: optimizer.lr=3: an analysis takes the optimizer as the run's checkpoint holds it",
        ),
        (
            "data.batch_size=7",
            2,
            "error: data.batch_size=7: a setting of training batches, which analyses do not use; set data.eval",
        ),
        (
            "optimizer=sgd",
            2,
            "error: optimizer: no group of this command; leave it out: analyze.py takes the optimizer that",
        ),
        (
            "trainer=cpu",
            2,
            "error: trainer: an analysis takes trainer=ddp or trainer=slurm alone; leave it out; device=cpu or",
        ),
        ("model.depth=2", 4, "use the model it was made with"),
    ):
        capsys.readouterr()
        assert call("analyze", f"run={run}", override, *measured) == code
        err = capsys.readouterr().err
        assert text in err
        assert "belongs to a run" not in err
    assert not (run / "results").exists()
