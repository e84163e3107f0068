from __future__ import annotations

import importlib

import pytest
import torch
from huggingface_hub import constants

from vitscope import models
from vitscope.models import timm_internals


def test_any_timm_name_at_any_size() -> None:
    for name, size in (("resnet18", 40), ("vit_tiny_patch16_224", 32), ("convnext_atto", 32)):
        model = models.timm_model(name, num_classes=7, image_size=size).eval()
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 7)


def test_channels_classes_and_options_are_passed_on() -> None:
    model = models.timm_model("resnet18", in_chans=1, zero_init_last=False)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 1000)
    assert model.layer1[0].bn2.weight.abs().min() == 1


def test_an_unknown_name_has_its_neighbors_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet5O'; did you mean resnet50"):
        models.timm_model("resnet5O")
    with pytest.raises(ValueError, match=r"see timm.list_models"):
        models.timm_model("zzzzzz")


def test_gradient_checkpointing_where_timm_has_it() -> None:
    assert models.timm_model("vit_tiny_patch16_224", image_size=32, grad_checkpointing=True).grad_checkpointing
    with pytest.raises(ValueError, match="PoolingVisionTransformer has no gradient checkpointing"):
        models.timm_model("pit_ti_224", grad_checkpointing=True)


def test_pretrained_weights_without_a_network_fail_fast(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # the package has a function of the module's name
    monkeypatch.setattr(importlib.import_module("vitscope.models.timm_model"), "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    offline: list[bool] = []
    offline_hub = timm_internals.offline_hub
    monkeypatch.setattr(timm_internals, "offline_hub", lambda value: offline.append(value) or offline_hub(value))
    with pytest.raises(Exception, match=r"locate the file|offline|cache"):
        models.timm_model("resnet18", pretrained=True)
    assert offline == [True], "the client would try the hub again and again"
    assert constants.HF_HUB_OFFLINE is False
