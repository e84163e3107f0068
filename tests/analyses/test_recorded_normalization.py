"""The notice of images that are normalized otherwise than timm records for their network."""

from __future__ import annotations

import logging

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitscope.analyses.recorded_normalization import note_other_normalization

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FOLDER = {"source": {"_target_": "vitscope.data.sources.folder.load"}, **IMAGENET, "transform": None}
CIFAR = {**FOLDER, "source": {"_target_": "vitscope.data.sources.cifar.load"}}


def cfg_of(data: dict, pretrained: bool = False) -> DictConfig:
    model = {"_target_": "vitscope.models.timm_model", "name": "vit", "pretrained": pretrained}
    return OmegaConf.create({"model": model, "data": data})


def network(recorded: dict) -> nn.Module:
    model = nn.Linear(1, 1)
    model.pretrained_cfg = recorded
    return model


@pytest.mark.parametrize(
    "arguments", [(cfg_of(FOLDER), True), (cfg_of(FOLDER, True), False), (cfg_of(CIFAR, True), False)]
)
def test_another_normalization_than_timms_is_noted(arguments: tuple[DictConfig, bool], caplog) -> None:
    cfg, has_file = arguments
    with caplog.at_level(logging.INFO):
        note_other_normalization(cfg, network(HALVES), ["model"], has_file)
    assert "data.mean=[0.485,0.456,0.406]" in caplog.text
    assert "timm records [0.5,0.5,0.5] and [0.5,0.5,0.5] for vit" in caplog.text


@pytest.mark.parametrize(
    ("cfg", "recorded", "keys", "has_file"),
    [
        (cfg_of(FOLDER), IMAGENET, [], True),  # the same
        (cfg_of(FOLDER), HALVES, ["data.mean", "data.std"], True),  # stated
        (cfg_of({**FOLDER, "transform": "model"}), HALVES, [], True),
        (cfg_of(CIFAR), HALVES, [], True),  # statistics of the data set, and a file that was trained on it
        (cfg_of(FOLDER), HALVES, [], False),  # untrained
        (cfg_of(FOLDER, True), {}, [], False),
    ],
)
def test_nothing_is_noted_otherwise(cfg: DictConfig, recorded: dict, keys: list[str], has_file: bool, caplog) -> None:
    with caplog.at_level(logging.INFO):
        note_other_normalization(cfg, network(recorded), keys, has_file)
    assert not caplog.records
