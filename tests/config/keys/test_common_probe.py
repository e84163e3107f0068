"""``probe.*`` sets the images of all chosen analyses; a checkpoint without a run has clean test images as its default."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import DictConfig

from tests.fixtures.configs.configurations import composed
from vitscope.config import loading
from vitscope.config.keys import common_probe
from vitscope.config.validation import validate_plain_values
from vitscope.runtime.errors import ConfigError

CHOSEN = "analysis=[hessian,fourier,shape_bias,calibration,taps]"


def applied(*overrides: str, command: str = "analyze") -> DictConfig:
    cfg = composed(command, "model=vit", *overrides)
    common_probe.apply_common_probe(cfg, overrides)
    return cfg


def probes(cfg: DictConfig, *keys: str) -> dict[str, tuple[Any, ...]]:
    return {str(name): tuple(node.probe[key] for key in keys) for name, node in cfg.analysis.items()}


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_the_keys_set_all_chosen_analyses(command: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["probe.split=val", "probe.n_images=7", "probe.augment=false"]
    with caplog.at_level(logging.INFO, logger="vitscope"):
        cfg = applied(CHOSEN, *keys, command=command)
    assert probes(cfg, "split", "n_images", "augment") == {
        "hessian": ("val", 7, False),
        "fourier": ("val", 7, False),
        "shape_bias": ("cue_conflict", 7, False),
        "calibration": ("test", 7, False),
        "taps": ("test", 1, False),
    }
    assert caplog.messages == [
        "probe.split=val: not applied to analysis.shape_bias: it needs the images of the split cue_conflict",
        "probe.split=val: not applied to analysis.calibration: its temperature is fitted on those images",
        "probe.split=val: not applied to analysis.taps: it reads shapes from one image",
        "probe.n_images=7: not applied to analysis.taps: it reads shapes from one image",
        "probe.augment=false: not applied to analysis.taps: it reads shapes from one image",
    ]
    assert loading.plain(cfg.probe) == {"split": None, "n_images": None, "augment": None, "cache": "auto"}
    validate_plain_values(cfg)
    before = loading.plain(cfg)
    common_probe.apply_common_probe(cfg)
    assert loading.plain(cfg) == before


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["analysis.hessian.probe.split=train"], ("train", 7, True)),
        (["++analysis.hessian.probe={split: val, n_images: 3, augment: false}"], ("val", 3, False)),
    ],
)
def test_an_override_of_one_analysis_wins(own: list[str], expected: tuple[Any, ...]) -> None:
    cfg = applied("analysis=[hessian,fourier]", "probe.split=test", "probe.n_images=7", *own)
    images = probes(cfg, "split", "n_images", "augment")
    assert images == {"hessian": expected, "fourier": ("test", 7, False)}


def test_all_images_and_an_objective_s_augmentation() -> None:
    cfg = applied("analysis=[hessian]", "probe.n_images=all", "probe.augment=strong")
    assert probes(cfg, "n_images", "augment") == {"hessian": (None, "strong")}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("probe.n_images=0", "probe.n_images=0: not a number of images"),
        ("probe.n_images=many", "probe.n_images=many: not a number of images"),
        ("probe.augment=strog", "probe.augment=strog: neither true, false nor an objective; did you mean strong"),
        ("probe.split=3", "probe.split=3: not the name of a split"),
        ("+probe.batch_size=3", r"probe.batch_size=3: no key of all analyses; .* analysis.<name>.probe.batch_size"),
    ],
)
def test_a_value_that_no_analysis_takes_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        applied(override)
    with pytest.raises(ConfigError, match=text):  # not only where it is applied
        validate_plain_values(composed("analyze", "model=vit", override))


@pytest.mark.parametrize(
    ("overrides", "hessian", "weight_decay", "groups"),
    [
        ([], ("test", False), 0.0, ("images", "objective")),
        (["probe.split=train"], ("train", False), 0.0, ("images", "objective")),
        (["probe.split=null", "probe.augment=null"], ("train", True), 0.0, ("objective",)),
        (["analysis.hessian.probe.augment=true"], ("test", True), 0.0, ("images", "objective")),
        (["objective.weight_decay=0.05"], ("test", False), 0.05, ("images",)),
        (["objective=strong"], ("test", False), 0.05, ("images",)),
        (["objective.weight_decay=0"], ("test", False), 0.0, ("images",)),
        (["run=runs/a"], ("test", False), 0.05, ("images",)),  # a folder that was made for the file
        (["experiment=fig4_hessian_spectra"], ("train", True), 0.05, ()),
    ],
)
def test_a_checkpoint_without_a_run_is_measured_on_clean_test_images(
    overrides: Sequence[str], hessian: tuple[Any, ...], weight_decay: float, groups: tuple[str, ...]
) -> None:
    arguments = ["ckpt_path=my.pth", "analysis=[hessian,landscape_official,shape_bias]", *overrides]
    cfg = applied(*arguments)
    assert common_probe.apply_checkpoint_defaults(cfg, arguments) == groups
    images = probes(cfg, "split", "augment")
    assert images["hessian"] == hessian
    assert images["shape_bias"][0] == "cue_conflict"
    assert images["landscape_official"][0] == "train"
    assert cfg.objective.weight_decay == weight_decay


def test_a_model_without_a_checkpoint_keeps_its_defaults() -> None:
    cfg = applied("analysis=[hessian]")
    assert common_probe.apply_checkpoint_defaults(cfg) == ()
    assert probes(cfg, "split", "augment") == {"hessian": ("train", True)}
    assert cfg.objective.weight_decay == 0.05


def test_a_stored_configuration_of_an_earlier_version_takes_the_keys_once() -> None:
    cfg = composed("train", "model=vit", "analysis=[hessian]")
    stored = DictConfig({key: value for key, value in loading.plain(cfg).items() if key != "probe"})
    with common_probe.provided(stored):
        stored.probe.split = "test"
        common_probe.apply_common_probe(stored)
    assert "probe" not in stored
    assert stored.analysis.hessian.probe.split == "test"
