"""Losses of a configuration: training and analyses under a named loss and a loss of the user's own, and one line for slips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.fixtures.runs.run_folders import only_run
from vitscope.config import experiment_identity, loading

OWN = """
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x):
        return {"logits": self.fc(self.conv(x).tanh().mean((2, 3)))}


def focal(outputs, targets, gamma=1.0):
    log_p = -F.cross_entropy(outputs, targets, reduction="none")
    return -((1 - log_p.exp()) ** gamma) * log_p


class Poly(nn.Module):
    def __init__(self, epsilon=1.0):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, outputs, targets):
        nll = F.cross_entropy(outputs, targets, reduction="none")
        return nll + self.epsilon * (1 - (-nll).exp())


class Learned(Poly):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
"""
SMALL = ["model=module", "model._target_={}.Net", "data=digits", "objective=clean", "logger=none"]
TRAINED = [*SMALL, "test=false", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1",
           "trainer.accelerator=cpu", "data.batch_size=4", "data.eval_batch_size=4", "analysis=[hessian_trace]",
           "analysis.hessian_trace.probe.n_images=4", "analysis.hessian_trace.n_vectors=1"]  # fmt: skip


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package of the user's and admit it; return its name."""
    name = f"mylosses_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VITSCOPE_TRUST", name)
    return name


def trained(mylab: str) -> list[str]:
    return [argument.format(mylab) for argument in TRAINED]


def card_of(run: Path) -> str:
    (file,) = sorted((run / "results" / "hessian_trace").glob("*.json"))
    return json.loads(file.read_text())["card"]["loss"]


def logged(run: Path) -> set[str]:
    return {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}


def test_training_and_analysis_follow_a_named_loss(call, mylab: str, tmp_path: Path) -> None:
    runs = f"paths.runs={tmp_path}/runs"
    assert call("train", *trained(mylab), "objective.loss=mse", runs) == 0
    run = only_run(tmp_path)
    assert OmegaConf.load(run / "config.yaml").objective.loss == "mse"
    assert card_of(run) == "mean squared error over outputs, class indices, label smoothing 0"
    assert {"val/loss", "val/accuracy"} <= logged(run)
    assert not {"val/nll", "val/ece", "val/brier"} & logged(run)
    other = ["analysis=[hessian_trace]", "analysis.hessian_trace.probe.n_images=4", "objective.loss=bce", "device=cpu"]
    assert call("analyze", f"run={run}", *other) == 0
    cards = {
        json.loads(file.read_text())["card"]["loss"] for file in (run / "results" / "hessian_trace").glob("*.json")
    }
    assert "binary cross entropy over outputs, class indices, label smoothing 0" in cards


FORMS = {
    "name": ["objective.loss={}.focal"],
    "function": ["objective.loss._target_={}.focal", "objective.loss.gamma=2.0"],
    "class": ["objective.loss={{_target_:{}.Poly,epsilon:2.0}}"],
}


@pytest.mark.parametrize("form", FORMS)
def test_training_and_analysis_follow_an_own_loss(call, mylab: str, tmp_path: Path, form: str) -> None:
    loss = [argument.format(mylab) for argument in FORMS[form]]
    assert call("train", *trained(mylab), *loss, f"paths.runs={tmp_path}/runs") == 0
    assert card_of(only_run(tmp_path)).startswith(f"own loss {mylab}.")


SLIPS = {
    "objective.loss=mea": "error: objective.loss=mea: not one of cross_entropy, mse, bce, dense_cross_entropy; ",
    "objective.loss=dense_cross_entropy": "error: objective.loss: cannot be evaluated (Expected outputs (B, C, H, W)",
    "objective.loss=elsewhere.focal": "error: objective.loss._target_=elsewhere.focal: its package is not trusted",
    "objective.loss={}.lost": "no such name",
    "objective.loss={{_target_:{}.focal,beta:2}}": "unexpected keyword argument 'beta'",
    "objective.loss={}.Learned": "has parameters, which no optimizer trains here",
    "objective.loss=torch.nn.Linear": "not a loss; set objective.loss._target_=torch.nn.HuberLoss",
    "objective.loss=7": "error: objective.loss=7: not ",
    "objective.loss={{gamma:2}}": "neither a name nor a mapping with _target_",
    "objective.loss=mse callbacks.checkpoint.monitor=val/nll": "error: callbacks.checkpoint.monitor=val/nll: no such metric",
    "objective.label_smoothing=0.1 objective.loss={}.focal": "error: objective.label_smoothing=0.1: cannot be applied",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_one_line_and_exit_with_2(call, mylab: str, tmp_path: Path, capsys, slip: str) -> None:
    assert call("train", *trained(mylab), *slip.format(mylab).split(" "), f"paths.runs={tmp_path}/runs") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert SLIPS[slip] in lines[0]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_the_default_loss_changes_no_identity() -> None:
    recipe = OmegaConf.load(loading.folder() / "objective" / "weak.yaml")
    cfg = OmegaConf.create(
        {"model": {}, "data": {}, "trainer": {}, "callbacks": {}, "optimizer": {}, "objective": recipe}
    )
    earlier = OmegaConf.create(cfg)
    del earlier.objective["loss"]
    assert experiment_identity.config_hash(cfg) == experiment_identity.config_hash(earlier)
    assert experiment_identity.identity(cfg) == experiment_identity.identity(earlier)
    assert experiment_identity.recipe(cfg) == experiment_identity.recipe(earlier) == "weak"
    cfg.objective.loss = "mse"
    assert experiment_identity.config_hash(cfg) != experiment_identity.config_hash(earlier)
