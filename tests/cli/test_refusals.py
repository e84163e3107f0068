"""Faults that show only when something is built, loaded or called get one line before there is a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.fixtures.configs.configurations import composed
from vitscope.config import dry_run
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.runtime.errors import ConfigError

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["optimizer.betas=[2,2]"], "error: optimizer: Invalid beta"),
        (["optimizer.betas=[0.9]"], "error: optimizer.betas"),
        (["optimizer.eps=-1"], "error: optimizer: Invalid epsilon"),
        (["optimizer._target_=torch.optim.Optimizer", "~optimizer.betas", "~optimizer.eps"], "error: optimizer"),
        (
            ["optimizer.schedule.kind=cosin"],
            "error: optimizer.schedule: Expected kind to be cosine, multistep or constant",
        ),
        (["optimizer.schedule.milestones=[a]", "optimizer.schedule.kind=multistep"], "error: optimizer.schedule"),
        (["trainer.accelerator=abacus"], "error: trainer: "),
        (["trainer.devices=0"], "error: trainer: "),
        pytest.param(
            ["trainer=ddp"],
            "error: trainer.accelerator=gpu: torch finds no GPU on this machine; set trainer.accelerator=cpu trainer.devices=2",
            marks=NEEDS_NO_GPU,
        ),
        pytest.param(["trainer=gpu"], "error: trainer.accelerator=gpu: torch finds no GPU", marks=NEEDS_NO_GPU),
        (["trainer.strategy=telepathy"], "error: trainer: "),
        (["trainer.precision=7"], "error: trainer.precision=7"),
        (["trainer.profiler=abc"], "error: trainer: "),
        (["trainer.max_time=abc"], "error: trainer: "),
        (
            ["trainer.max_epochs=-1", "trainer.max_time='00:00:01:00'"],
            "error: optimizer.schedule.kind=cosine: a cosine schedule",
        ),
        (["callbacks.checkpoint.mode=up"], "error: callbacks.checkpoint.mode=up: Expected mode to be 'min' or 'max'"),
        (["callbacks.lr_monitor.logging_interval=abc"], "error: callbacks.lr_monitor"),
        (["trainer.limit_val_batches=0.0001"], "error: trainer.limit_val_batches=0.0001: no batch"),
        (["ckpt_path=/nowhere/x.ckpt"], "error: ckpt_path=/nowhere/x.ckpt: no such file"),
        (["run=/nowhere", "--cfg", "job"], "error: run=/nowhere"),
    ],
)
def test_found_before_there_is_a_run(call, tiny, tmp_path, capsys, arguments, text) -> None:
    base = [a for a in tiny if not any(a.partition("=")[0].startswith(b.partition("=")[0]) for b in arguments)]
    assert call("train", *base, *arguments) in (2, 4)
    assert one_line(capsys).startswith(text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (nn.Linear(5, 16), r"data\.image_size=32: the model cannot take its images"),
        (nn.Conv2d(1, 16, 3), r"data\.image_size=32: the model cannot take its images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 7)), r"data\.num_classes=16: two images give .* outputs \(2, 7\)"),
        (nn.Identity(), r"data\.num_classes=16: two images give"),
    ],
)
def test_a_model_that_does_not_fit_the_data(network: nn.Module, why: str) -> None:
    data = SimpleNamespace(channels=3, image_size=32, num_classes=16)
    network.train()
    with pytest.raises(ConfigError, match=why):
        dry_run._forward(composed("train"), network, data)
    assert network.training


@pytest.fixture
def stopped(trained) -> Path:
    """Return a run of one epoch that says it was stopped."""
    run = trained("analysis=[]", "test=false")
    run_dir.Run(run).note(status="stopped")
    return run


def test_a_checkpoint_that_is_none(call, tiny, stopped, tmp_path, capsys) -> None:
    capsys.readouterr()
    assert call("train", f"run={stopped}", "ckpt_path=/nowhere/x.ckpt") == 4
    assert one_line(capsys).startswith("error: ckpt_path=/nowhere/x.ckpt: no such file")
    odd = tmp_path / "odd.ckpt"
    for content in ({"state_dict": 5}, {"vitscope": 5, "loops": {}}, {"optimizer_states": "x"}, {}):
        torch.save(content, odd)
        assert call("train", f"run={stopped}", f"ckpt_path={odd}") == 4
        assert one_line(capsys).startswith("error: ckpt_path=")
        assert call("analyze", f"run={stopped}", "analysis=[taps]", "ckpt=none") == 4
        capsys.readouterr()


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "callbacks", "vitscope", "lr_schedulers"])
def test_a_checkpoint_with_a_part_that_is_damaged(call, stopped, tmp_path, capsys, part) -> None:
    """Plain values of a wrong kind, which no hash and no reader refuses: exit 4, wherever restoring meets them."""
    content = checkpoint_io.read(stopped / "checkpoints" / "last.ckpt")
    damaged = {"loops": {"fit_loop": 5}, "optimizer_states": [{"state": {0: 5}, "param_groups": [5]}], "vitscope": {"epoch": 0},
               "callbacks": dict.fromkeys(content["callbacks"], 5), "lr_schedulers": [5]}  # fmt: skip
    torch.save({**content, part: damaged[part]}, tmp_path / "x.ckpt")
    capsys.readouterr()
    assert call("train", f"run={stopped}", f"ckpt_path={tmp_path}/x.ckpt", "trainer.max_epochs=2") == 4
    assert one_line(capsys).startswith(f"error: ckpt_path={tmp_path}/x.ckpt: ")


@pytest.mark.parametrize("change", ["optimizer.lr=0.5", "optimizer.betas=[0.8,0.9]", "objective.weight_decay=0.3"])
def test_a_checkpoint_of_another_optimizer(call, stopped, capsys, change) -> None:
    """Its state holds the rates: another one on the command line would be passed over in silence."""
    cfg = run_dir.Run(stopped).config()
    capsys.readouterr()
    given = [change, "optimizer.weight_decay=0.3"] if change.startswith("objective") else [change]
    assert call("train", f"run={stopped}", "trainer.max_epochs=2", *given) == 4
    assert one_line(capsys).startswith(f"error: {given[-1].partition('=')[0]}")
    cfg.optimizer = {"_target_": "torch.optim.Rprop", "lr": 0.1, "schedule": cfg.optimizer.schedule}
    (stopped / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    assert call("train", f"run={stopped}", "trainer.max_epochs=2") == 4
    assert one_line(capsys).startswith("error: optimizer: the values in the checkpoint")


def test_a_new_run_from_a_file(call, tiny, stopped, tmp_path, capsys) -> None:
    """``ckpt_path=<file>`` without ``run=`` was passed over once: training began from scratch in silence."""
    file = tmp_path / "x.ckpt"
    shutil.copy(stopped / "checkpoints" / "last.ckpt", file)
    assert (
        call(
            "train",
            *tiny,
            "analysis=[]",
            "test=false",
            f"ckpt_path={file}",
            "trainer.max_epochs=2",
            f"run_dir={tmp_path}/b",
        )
        == 0
    )
    assert checkpoint_io.read(tmp_path / "b" / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert not (tmp_path / "b" / "checkpoints" / "init.ckpt").exists()  # it went on from step 4
    state = checkpoint_weights.model_state(checkpoint_io.read(file))
    torch.save(state, tmp_path / "weights.ckpt")
    shutil.rmtree(tmp_path / "b")
    arguments = ["analysis=[]", "test=false", f"ckpt_path={tmp_path}/weights.ckpt", f"run_dir={tmp_path}/b"]
    assert call("train", *tiny, *arguments) == 0
    init = checkpoint_weights.model_state(checkpoint_io.read(tmp_path / "b" / "checkpoints" / "init.ckpt"))
    assert all(torch.equal(value, init[name]) for name, value in state.items())
