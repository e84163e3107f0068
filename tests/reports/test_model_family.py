"""The family of a timm model by its units, and that claims count it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.fixtures.runs.report_runs import bench, configuration, spectrum
from vitscope.config import model_facts
from vitscope.reports.claims import claim_statistics
from vitscope.reports.model_family import kin


def timm(name: str, image_size: int = 224) -> dict:
    cfg = configuration("vit", 0)
    cfg["model"] = {"_target_": "vitscope.models.timm_model", "name": name, "num_classes": 10, "image_size": image_size}
    cfg["data"]["image_size"] = image_size
    return cfg


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vit_tiny_patch16_224", "vit"),
        ("deit_tiny_distilled_patch16_224", "vit"),
        ("pit_ti_224", "pit"),
        ("swin_tiny_patch4_window7_224", "swin"),
        ("resnet18", "convnet"),
        ("resnext50_32x4d", "convnet"),
        ("resnetv2_50", "convnet"),
        ("mixer_s32_224", "mixer"),
        ("convnext_atto", "convnext_atto"),  # pools between its stages: not the paper's ConvNet
        ("vgg11", "vgg11"),  # no residual units
        ("no_such_model", "no_such_model"),
    ],
)
def test_timm_models_by_their_units(name: str, family: str) -> None:
    cfg = timm(name)
    assert kin(cfg, {"model": model_facts.of_model(OmegaConf.create(cfg))}) == family


def test_an_older_run_s_timm_model_keeps_its_name() -> None:
    assert kin(timm("resnet18"), {}) == "resnet18"
    assert kin(timm("resnet18"), {"model": {"family": ["vit"]}}) == "resnet18"


def test_our_models_by_their_builder() -> None:
    for name in ("alternet", "convnet", "vit", "convit", "pit", "swin"):
        assert kin(configuration(name, 0), {}) == name


def test_claims_count_timm_models(make_run: Callable, tmp_path: Path) -> None:
    neps = {"vit_tiny_patch16_224": 0.6, "pit_ti_224": 0.4, "swin_tiny_patch4_window7_224": 0.2, "resnet18": 0.0}
    for name, nep in neps.items():
        facts = {"model": model_facts.of_model(OmegaConf.create(timm(name)))}
        run = make_run("vit", measured={"hessian": spectrum(nep)}, facts=facts)
        (run.path / "config.yaml").write_text(yaml.safe_dump(timm(name)))
    found = claim_statistics.bias_trend(bench(tmp_path))
    assert found.values == pytest.approx({0: -0.2}, rel=1e-9)
    assert found.compared.startswith("vit_tiny_patch16_224")
