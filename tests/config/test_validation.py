"""Configurations that cannot work are refused in one line that names the key, before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.fixtures.configs.configurations import composed
from vitscope.config import cross_checks, dry_run, error_translation, target_allowlist
from vitscope.config.signature_checks import shown
from vitscope.config.validation import validate
from vitscope.runtime.errors import ConfigError, StorageError, VitscopeError

CASES = [
    ("optimizer.lr=nan", "optimizer.lr=nan", "finite"),
    ("optimizer.lr=inf", "optimizer.lr=inf", "finite"),
    ("optimizer.lr=-1", "optimizer.lr=-1", "greater than 0"),
    ("optimizer.lr=fast", "optimizer.lr=fast", "type"),
    ("data.batch_size=0", "data.batch_size=0", "at least 1"),
    ("data.batch_size=2.5", "data.batch_size=2.5", "type"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0", "at least 1"),
    ("trainer.max_epochs=-1", "trainer.max_epochs=-1", "never end"),
    ("data.fraction=1.5", "data.fraction=1.5", r"\(0, 1\]"),
    ("objective.label_smoothing=1", "label_smoothing=1", r"\[0, 1\)"),
    ("objective.l2=l1", "objective.l2=l1", "choose from|did you mean"),
    ("+model.typo=1", "model.typo=1", "no such key"),
    ("+model.widow_size=2", "model.widow_size=2", "did you mean window_size"),
    (
        "+model.capabilities.residual_unit=false",
        "model.capabilities.residual_unit=False",
        "did you mean residual_units",
    ),
    ("+model.capabilities.stem=2", "model.capabilities.stem=2", "not of type bool"),
    ("+model.capabilities=none", "model.capabilities=none", "not a group of keys"),
    ("+trainer.max_epoch=2", "trainer.max_epoch=2", "did you mean max_epochs"),
    ("+objective.smoothing=.1", "objective.smoothing", "no such key"),
    ("+analysis.hessian.n_tops=3", "analysis.hessian.n_tops=3", "did you mean n_top"),
    ("+analysis.hessian.probe.images=3", "analysis.hessian.probe.images", "did you mean n_images"),
    ("analysis.landscape.directions=randm", "analysis.landscape.directions=randm", "did you mean random"),
    ("analysis.landscape.directions=eigenvectors", "analysis.landscape.eigenvectors", "saved result"),
    ("analysis.landscape.probe.augment=stong", "analysis.landscape.probe.augment=stong", "did you mean strong"),
    ("callbacks.checkpoint.snapshots=lgo", "callbacks.checkpoint.snapshots=lgo", "log"),
    ("callbacks.checkpoint.monitor=val/acc", "callbacks.checkpoint.monitor=val/acc", "did you mean val/accuracy"),
    ("model.window_size=7", "model.window_size=7", "choose from"),
    ("model.num_classes=10", "model.num_classes=10", "data.num_classes is 16"),
    ("model._target_=os.system", "model._target_=os.system", "not trusted"),
    ("model._target_=torch.load", "model._target_=torch.load", "not meant to be configured"),
    ("model._target_=vitscope.models.nothing", "model._target_", "no such name"),
    ("optimizer._target_=torch.optim.AdamWW", "optimizer._target_", "AdamW"),
]


@pytest.mark.parametrize(("override", "key", "why"), CASES, ids=[case[0] for case in CASES])
def test_refused_in_one_line(override: str, key: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        validate(composed("train", override))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_patches_that_do_not_divide() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.patch_size=5: does not divide data\.image_size=32; choose from 1, 2, 4, 8, 16"
    ):
        validate(composed("train", "model=vit", "model.patch_size=5"))


@pytest.mark.parametrize("target", ["timm.models.load_checkpoint", "torchvision.datasets.utils.extract_archive",
                                    "vitscope.config.loading.importlib.import_module",
                                    "vitscope.runs.checkpoints.checkpoint_io.read",
                                    "pytorch_lightning.cli.LightningCLI", "timm.utils.model.os.remove",
                                    "torch.nn.modules.module.torch.load", "vitscope.models.torch.hub.load"])  # fmt: skip
def test_targets_are_judged_by_what_they_are(target: str) -> None:
    with pytest.raises(ConfigError):
        target_allowlist.resolve(target, "model")


def test_nested_and_partial_targets_are_judged_too() -> None:
    cfg = composed("train", "+data.source.hook._target_=os.system", "+data.source.hook._partial_=true")
    with pytest.raises(ConfigError, match="not trusted"):
        validate(cfg)


def test_a_package_of_the_user_needs_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="VITSCOPE_TRUST=collections"):
        target_allowlist.resolve("collections.OrderedDict", "model")
    monkeypatch.setenv("VITSCOPE_TRUST", "collections")
    assert target_allowlist.resolve("collections.OrderedDict", "model")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match=r"paths\.runs"):
        validate(composed("train", f"paths.runs={file}/runs"))


def test_errors_are_one_kind() -> None:
    assert issubclass(ConfigError, VitscopeError)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("trainer.precision=16-mixed", "gradient scaling"),
        ("trainer.precision=16-true", "rounding of half-precision"),
        ("trainer.precision=bf16-true", "rounding of half-precision"),
    ],
)
def test_sam_refuses_what_its_second_pass_cannot_do(override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        validate(composed("train", "optimizer=sam", override))
    assert override in str(caught.value)
    validate(composed("train", "optimizer=adamw", override))
    validate(
        composed("train", "optimizer=sam", "trainer.accumulate_grad_batches=2")
    )  # its second pass makes the group again


def test_a_batch_of_one_image_under_batchnorm_is_one_line() -> None:
    """The last batch of an epoch, where the network ends with one value for each channel."""
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))
    line = error_translation.explain(caught.value)
    assert str(line).startswith(
        "data.batch_size: a batch holds one image, over which BatchNorm cannot compute a variance; "
    )


def test_a_training_on_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.num_classes=1: a classifier is trained on two classes or more; add"):
        dry_run.rehearse(composed("train"), nn.Linear(1, 1), SimpleNamespace(num_classes=1))


@pytest.mark.parametrize(
    ("subset", "reason"),
    [
        (
            "*.qkv.weight",
            "Expected a parameter subset that matches something, received '*.qkv.weight'; there are: weight, bias",
        ),
        ("layer:blocks.3", "Expected a parameter subset that matches something"),
        ("part:query", "Expected a part to be one of q, k, v"),
        (["weight", "kind:attention"], "Expected a kind to be one of stem, conv, msa"),
        ("stage:last", "Expected the number of a stage"),
    ],
)
def test_parameters_that_a_network_lacks_are_named_before_the_training(
    subset: str | list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep over networks goes on, as one network may have what another lacks."""
    key = rf"analysis.a.parameters={shown(subset)}: {reason}"
    dry_run.check_subsets(OmegaConf.create({"analysis": {"a": {"parameters": subset}}}), nn.Linear(1, 1))
    assert key in caplog.text
    assert caplog.text.count("no result for this network") == 1
    with pytest.raises(ConfigError, match=re.escape(key)):
        refused = {"analysis": {"a": {"parameters": subset, "on_error": "raise"}}}
        dry_run.check_subsets(OmegaConf.create(refused), nn.Linear(1, 1))


@pytest.mark.parametrize("subset", [None, "all", "weight", "*", "kind:head", "stage:0", "part:q", ["bias", "stage:2"]])
def test_parameters_that_a_network_may_have_are_not_named(subset: Any, caplog: pytest.LogCaptureFixture) -> None:
    dry_run.check_subsets(OmegaConf.create({"analysis": {"a": {"parameters": subset}, "b": {}}}), nn.Linear(1, 1))
    assert not caplog.text


def test_an_average_that_no_checkpoint_holds_is_refused() -> None:
    """The test metrics would be those of weights that are lost."""
    swa = "+callbacks.swa={_target_: pytorch_lightning.callbacks.StochasticWeightAveraging, swa_lrs: 0.001}"
    with pytest.raises(
        ConfigError, match=r"callbacks.swa=.*: its average is tested and is in no checkpoint; use callbacks="
    ):
        validate(composed("train", swa))


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (["trainer.max_epochs=-1", "trainer.max_time='00:01:00:00'"], True),
        (["trainer.max_epochs=null", "trainer.max_time='00:01:00:00'"], True),
        (["trainer.max_epochs=-1", "trainer.max_time='00:01:00:00'", "optimizer.schedule.kind=constant"], False),
        (["trainer.max_epochs=-1", "trainer.max_time='00:01:00:00'", "trainer.max_steps=100"], False),
        (["trainer.max_epochs=9", "trainer.max_time='00:01:00:00'"], False),
    ],
)
def test_a_cosine_without_an_end_is_refused(overrides: list[str], is_refused: bool) -> None:
    """The rate of a training that only its time ends would never fall."""
    cfg = composed("train", *overrides)
    validate(cfg)
    if not is_refused:
        cross_checks.check_schedule_length(cfg)
        return
    with pytest.raises(ConfigError) as caught:
        cross_checks.check_schedule_length(cfg)
    assert str(caught.value) == (
        "optimizer.schedule.kind=cosine: a cosine schedule needs the number of steps, which trainer.max_time alone does not "
        "give; set trainer.max_epochs=100 or trainer.max_steps=10000 beside it, or optimizer.schedule.kind=constant"
    )


def test_only_messages_of_processes_are_errors_of_processes() -> None:
    """A path may hold the letters of gloo."""
    assert error_translation.explain(FileNotFoundError(2, "No such file or directory", "/data/igloo/x.png")) is None
    assert error_translation.explain(KeyError("igloo")) is None
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer. ")
    assert error_translation.code_for(lost) == 7
