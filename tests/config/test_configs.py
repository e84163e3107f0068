"""Every configuration file composes, validates and builds; a new file is tested as soon as it exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.configs.configurations import CONF, composed, options
from tests.fixtures.configs.model_configs import CONFIGS
from vitscope.analyses import spec
from vitscope.config import caps, experiment_identity, factories, loading
from vitscope.config.keys import logger_choice
from vitscope.config.validation import validate
from vitscope.reproduce import plan
from vitscope.runtime.errors import ConfigError

#: figures and tables with their trials
PLAN = plan.read()
#: experiments of the trials of every figure and table
PLANNED = frozenset(trial.overrides[0] for name in PLAN["targets"] for trial in plan.target(name, PLAN, "smoke").trials)


@pytest.mark.parametrize(
    "group", ["objective", "optimizer", "trainer", "logger", "caps", "callbacks", "analysis", "profile"]
)
def test_every_option_composes_and_validates(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_choice, "is_installed", lambda name: True)  # loggers need optional packages
    choices = [f"{group}={option}" for option in options(group)]
    if group == "analysis":  # all in one composition
        choices = [f"analysis=[{','.join(options(group))}]"]
    elif group == "callbacks":
        choices = [f"callbacks=[{option}]" for option in options(group)]
    for choice in choices:
        cfg = composed("train", choice, f"paths.runs={tmp_path}")
        caps.apply_caps(cfg)
        validate(cfg)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_states_its_claim_and_cost(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    for line in ("Claim", "Command", "Cost", "Expected"):
        assert f"# {line}" in text, f"{experiment}.yaml does not open with its {line.lower()}"


@pytest.mark.parametrize(
    "experiment",
    [  # tests/reproduce/test_plan.py composes those that a figure or table of the paper needs
        pytest.param(name, marks=pytest.mark.slow if f"experiment={name}" in PLANNED else ())
        for name in options("experiment")
    ],
)
def test_every_experiment_composes_in_smoke_size(experiment: str, tmp_path: Path) -> None:
    cfg = composed("train", f"experiment={experiment}", "caps=smoke", f"paths.runs={tmp_path}")
    caps.apply_caps(cfg)
    validate(cfg)
    assert cfg.trainer.max_epochs == 1
    assert spec.parse(cfg.analysis)


@pytest.mark.parametrize("model", CONFIGS)
def test_every_model_does_a_step_at_every_size(model: str) -> None:
    sizes = {}
    for data in options("data"):
        sizes.setdefault(OmegaConf.load(CONF / "data" / f"{data}.yaml").image_size, data)
    for size, data in sizes.items():
        if size > 64:
            continue  # minutes on two cores; the models' own tests build them at 224
        cfg = composed("train", f"model={model}", f"data={data}")
        network = factories.model(cfg)
        logits = network(torch.randn(2, 3, size, size))
        assert logits.shape == (2, cfg.data.num_classes)
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


def test_an_empty_selection_is_empty() -> None:
    assert composed("train", "analysis=[]").analysis == {}
    cfg = composed("train", "analysis=[hessian,fourier]")
    assert [a.name for a in spec.parse(cfg.analysis)] == ["hessian", "fourier"]


def test_caps_lower_and_never_add_or_raise() -> None:
    cfg = composed("train", "analysis=[hessian]", "caps=smoke", "analysis.hessian.n_top=1")
    before = set(cfg.analysis.hessian)
    caps.apply_caps(cfg)
    assert set(cfg.analysis.hessian) == before
    assert cfg.analysis.hessian.n_top == 1
    assert cfg.analysis.hessian.probe.n_images == 32
    assert (cfg.trainer.max_epochs, cfg.trainer.limit_train_batches) == (1, 3)
    cfg = composed("train", "analysis=[sharpness]", "caps=smoke", "+caps.radii=0.1")
    caps.apply_caps(cfg)
    assert list(cfg.analysis.sharpness.radii) == [0.05, 0.1]


def test_what_an_experiment_sets_for_a_diagnostic_that_was_not_chosen_is_left_out(tmp_path: Path) -> None:
    cfg = composed("train", "experiment=table_models", "analysis=[fourier]", f"paths.runs={tmp_path}")
    assert loading.drop_unchosen(cfg) == ["corruption"]
    validate(cfg)
    assert list(cfg.analysis) == ["fourier"]
    assert loading.drop_unchosen(cfg) == []
    mistyped = composed("train", "analysis=[]", "+analysis.hesian.n_top=3", f"paths.runs={tmp_path}")
    assert loading.drop_unchosen(mistyped) == []
    with pytest.raises(ConfigError, match=r"analysis.hesian: no _target_"):
        validate(mistyped)


def test_hash_leaves_folders_out() -> None:
    one = composed("train", "paths.runs=a", "data.num_workers=2", "analysis=[]")
    assert experiment_identity.config_hash(one) == experiment_identity.config_hash(composed("train", "paths.runs=b"))
    for change in ("optimizer.lr=0.5", "data.random_labels=true"):
        assert experiment_identity.config_hash(one) != experiment_identity.config_hash(composed("train", change))


def test_stated_capabilities_belong_neither_to_the_experiment_nor_to_the_model() -> None:
    choices = ("model=vit", "model.depth=1", "data=digits")
    plain, stated = composed("train", *choices), composed("train", *choices, "+model.capabilities.residual_units=true")
    validate(stated)
    assert experiment_identity.config_hash(plain) == experiment_identity.config_hash(stated)
    assert experiment_identity.identity(plain) == experiment_identity.identity(stated)
    assert factories.model(stated).state_dict().keys() == factories.model(plain).state_dict().keys()
