"""Only ``ckpt_path`` names a file of weights, by whatever argument, prefix or nesting a configuration tries."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
from omegaconf import OmegaConf

from tests.fixtures.configs.configurations import composed, options
from vitscope.config import factories, instantiate, loading, target_allowlist, weight_files
from vitscope.runtime.errors import ConfigError

PROOF: list[str] = []


def called(text: str) -> dict:
    PROOF.append(text)
    return {}


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return called, ("a pickle was loaded",)


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a pickle that notes when it is loaded; return its path."""
    PROOF.clear()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(Evil()))
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil()))
    return str(file)


TIMM = {"_target_": "vitscope.models.timm_model", "name": "resnet18", "num_classes": 2}
ENTRY = {"_target_": "timm.models.resnet18", "num_classes": 2}
NODES = [
    {**TIMM, "name": "local-dir:FOLDER"}, {**TIMM, "name": "local_dir:FOLDER"}, {**TIMM, "name": "hf-hub:a/b"},
    {**TIMM, "name": "hf_hub:a/b"}, {**TIMM, "name": "HF-HUB:a/b"}, {**TIMM, "name": "resnet18.local-dir:FOLDER"},
    {**TIMM, "name": "timm/resnet18"}, {**TIMM, "name": "FILE"}, {**TIMM, "name": "file://FILE"}, {**TIMM, "name": "~/resnet18"},
    {**TIMM, "checkpoint_path": "FILE"}, {**TIMM, "pretrained_cfg": {"file": "FILE"}}, {**TIMM, "pretrained_cfg": "local-dir:x"},
    {**TIMM, "pretrained": True, "pretrained_cfg_overlay": {"file": "FILE"}}, {**TIMM, "pretrained": "FILE"},
    {**TIMM, "pretrained": {"file": "FILE"}}, {**TIMM, "cache_dir": "FOLDER"}, {**TIMM, "teacher": "resnet18"},
    {**TIMM, "teacher_path": "FILE"}, {**TIMM, "pretrained_path": "FILE"}, {**TIMM, "init_weights": "FILE"},
    {**TIMM, "weights": "FILE"}, {**TIMM, "x": "FILE"}, {**TIMM, "x": ["FILE"]}, {**TIMM, "x": {"y": {"z": ["FILE"]}}},
    {**TIMM, "x": {"y": [{"file": "a"}]}}, {**TIMM, "x": "evil"}, {**TIMM, "x": "https://host/w.bin"}, {**TIMM, "x": "s3://b/w"},
    {**ENTRY, "checkpoint_path": "FILE"}, {**ENTRY, "pretrained": True, "pretrained_cfg_overlay": {"file": "FILE"}},
    {**ENTRY, "pretrained": True, "pretrained_cfg": {"custom_load": True, "file": "FILE"}}, {**ENTRY, "cache_dir": "FOLDER"},
    {"_target_": "timm.task.LogitDistillationTask", "teacher_model": {"pretrained_path": "FILE"}},
    {"_target_": "timm.task.distillation.FeatureDistillationTask"}, {"_target_": "timm.task.DistillationTeacher"},
    {"_target_": "timm.utils.ModelEma", "resume": "FILE"}, {"_target_": "timm.utils.model_ema.ModelEmaV2"},
    {"_target_": "torchvision.models.resnet18", "weights": "FILE"},
    {"_target_": "torchvision.models.resnet18", "weights": "https://host/w.pth"},
    {"_target_": "torchvision.models.resnet18", "weights": {"url": "https://host/w"}},
    {"_target_": "torchvision.models.detection.fcos_resnet50_fpn", "weights_backbone": "FILE"},
    {"_target_": "torchmetrics.multimodal.CLIPScore", "model_name_or_path": "FOLDER"},
    {"_target_": "torchmetrics.text.BERTScore"},
    {"_target_": "torch.nn.Sequential", "x": {"_target_": "timm.models.resnet18", "checkpoint_path": "FILE"}},
    {"_target_": "torch.nn.Sequential", "x": [{"_target_": "timm.models.resnet18", "pretrained_cfg": {"file": "FILE"}}]},
    {"_target_": "vitscope.models.vit", "size": "FILE"},
]  # fmt: skip


def _filled(node: Any, file: str) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, file) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, file) for value in node]
    return node.replace("FILE", file).replace("FOLDER", str(Path(file).parent)) if isinstance(node, str) else node


@pytest.mark.parametrize("node", NODES, ids=str)
def test_no_argument_of_a_model_names_a_file(node: dict, pickled: str) -> None:
    """A model is refused in one line before it is built, and nothing is unpickled."""
    with pytest.raises(ConfigError) as caught:
        factories.model(OmegaConf.create({"model": _filled(node, pickled), "seed": 0}))
    assert str(caught.value).startswith("model.")
    assert "\n" not in str(caught.value)
    assert not PROOF


def test_interpolations_are_judged_by_their_value(pickled: str) -> None:
    cfg = OmegaConf.create({"model": {**TIMM, "name": "${a.b}:${c}"}, "a": {"b": "local-dir"}, "c": pickled, "seed": 0})
    with pytest.raises(ConfigError, match=r"model\.name=local-dir"):
        factories.model(cfg)


@pytest.mark.parametrize("key", ["source.file", "source.x", "cache", "x"])
def test_no_argument_of_data_but_its_root(key: str, pickled: str) -> None:
    cfg = composed("train", "data=digits")
    OmegaConf.update(cfg, f"data.{key}", pickled, force_add=True)
    with pytest.raises(ConfigError, match=f"data.{key}.*only ckpt_path may"):
        factories.data(cfg)


def test_every_name_of_timm_and_every_model_of_ours_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet18").write_text("")  # a file of a model's name is not what the name means
    monkeypatch.chdir(tmp_path)
    for name in timm.list_models() + timm.list_pretrained():
        weight_files.check({**TIMM, "name": name, "pretrained": True}, "model", "vitscope.models.timm_model")
    for group in ("model", "data"):
        for option in options(group):
            cfg = composed("train", f"{group}={option}")
            for place, node in instantiate.targets(loading.plain(cfg[group]), group):
                weight_files.check(node, place, "vitscope.models.timm_model" if group == "model" else "vitscope.data")
    weight_files.check({"weights": "IMAGENET1K_V1"}, "model", "torchvision.models.resnet")
    weight_files.check({"weights": "ResNet18_Weights.DEFAULT"}, "model", "torchvision.models.resnet")


def test_arguments_of_a_trusted_package_are_the_user_s(pickled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "collections.OrderedDict", "vocabulary": pickled}
    monkeypatch.setenv("VITSCOPE_TRUST", "collections")
    target_allowlist.check_target(node, "model")
