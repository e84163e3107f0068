"""Networks of other packages through ``model=module``, and numbers of classes that follow from folders and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import vitscope as vs
from tests.fixtures.runs.run_folders import only_run

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes: int = 1000, width: int = 4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Untold(Net):
    def __init__(self, width: int = 4):
        super().__init__(10, width)


class Lazy(nn.Sequential):
    def __init__(self, num_classes: int = 1000):
        super().__init__(nn.LazyConv2d(4, 3, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))
"""
MEASURED = ["analysis=[evaluation]", "analysis.evaluation.probe.n_images=4", "device=cpu"]
TRAINED = ["analysis=[]", "test=false", "logger=none", "trainer.max_epochs=1", "trainer.limit_train_batches=1",
           "trainer.limit_val_batches=1", "trainer.accelerator=cpu", "data.batch_size=4", "data.eval_batch_size=4"]  # fmt: skip


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package of the user's and admit it; return its name."""
    name = f"mylab_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VITSCOPE_TRUST", name)
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    def write(n_classes: int) -> Path:
        root = tmp_path / f"images-{n_classes}"
        random = np.random.default_rng(0)
        for label in range(n_classes):
            (root / "test" / f"c{label:02d}").mkdir(parents=True)
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / f"c{label:02d}" / "0.png")
        return root

    return write


def test_an_own_network_is_trained_and_measured(call, mylab: str, tmp_path: Path, capsys) -> None:
    runs = f"paths.runs={tmp_path}/runs"
    model = ["model=module", f"model._target_={mylab}.Net", "+model.width=6"]
    assert call("train", *model, "data=digits", *TRAINED, runs) == 0
    run = only_run(tmp_path)
    node = OmegaConf.load(run / "config.yaml").model
    assert OmegaConf.to_container(node) == {"_target_": f"{mylab}.Net", "width": 6, "num_classes": 10}
    assert call("analyze", f"run={run}", *MEASURED) == 0
    file = run / "checkpoints" / "last.ckpt"
    assert call("analyze", *model, "data=digits", *MEASURED, f"ckpt_path={file}", f"run_dir={tmp_path}/new") == 0
    one, other = (next(iter(vs.load_results(path)["evaluation"].values())) for path in (run, tmp_path / "new"))
    assert one.nll == other.nll
    untold = ["model=module", f"model._target_={mylab}.Untold", "+model.width=6"]
    assert call("analyze", *untold, "data=digits", *MEASURED, f"ckpt_path={file}", f"run_dir={tmp_path}/untold") == 0
    assert next(iter(vs.load_results(tmp_path / "untold")["evaluation"].values())).nll == one.nll
    capsys.readouterr()
    for arguments, code, text in (
        (["model=module"], 2, "error: model._target_=???: a value is required; set model._target_=..."),
        ([*model, "+model.depth=3"], 2, "error: model.depth=3: no such key; "),
        (["model=module", "model._target_=otherlab.Net"], 2, "set VITSCOPE_TRUST=otherlab if it is your own"),
        ([*untold, "+model.num_classes=10"], 2, "error: model.num_classes=10: no such key"),
    ):
        command = "train" if len(arguments) == 1 else "analyze"
        assert call(command, *arguments, "data=digits", runs, f"run_dir={tmp_path}/refused") == code
        err = capsys.readouterr().err.strip()
        assert text in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "refused").exists()


def test_a_network_of_lazy_layers_is_trained_and_measured(call, mylab: str, tmp_path: Path) -> None:
    model = ["model=module", f"model._target_={mylab}.Lazy"]
    assert call("train", *model, "data=digits", *TRAINED, f"run_dir={tmp_path}/lazy") == 0
    assert call("analyze", f"run={tmp_path}/lazy", *MEASURED) == 0
    weights = vs.load_probe(tmp_path / "lazy").model.state_dict()
    assert {name: tuple(w.shape) for name, w in weights.items()}["3.weight"] == (10, 4 * 8 * 8)


@pytest.mark.slow
def test_networks_of_torchvision_and_timm_are_built(call, tmp_path: Path, capsys) -> None:
    runs = f"paths.runs={tmp_path}/runs"
    for target in ("torchvision.models.squeezenet1_1", "timm.models.resnet10t"):
        model = ["model=module", f"model._target_={target}", "data=digits", "data.image_size=48"]
        assert call("analyze", *model, *MEASURED, runs, f"run_dir={tmp_path}/{target}") == 0
        assert OmegaConf.load(tmp_path / target / "config.yaml").model.num_classes == 10
    assert call("analyze", "model=module", "model._target_=torchvision.models.get_weight", "data=digits", runs) == 2
    assert "is not meant to be configured" in capsys.readouterr().err


def test_numbers_of_classes_follow_from_the_folder_and_the_checkpoint(
    call, mylab: str, folder: Callable[[int], Path], tmp_path: Path, capsys
) -> None:
    images = ["data=folder", f"data.root={folder(7)}", "data.image_size=16", "data.num_workers=0", *MEASURED]
    vit = ["model=vit", "model.depth=1", "model.patch_size=8"]
    torch.manual_seed(3)
    network = vs.models.vit("tiny", 7, 16, 8, depth=1)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    assert call("analyze", *vit, *images, f"ckpt_path={tmp_path}/vit.pth", f"run_dir={tmp_path}/vit") == 0
    cfg = OmegaConf.load(tmp_path / "vit" / "config.yaml")
    assert cfg.data.num_classes == cfg.model.num_classes == 7
    own = ["model=module", f"model._target_={mylab}.Net"]
    state = {"conv.weight": torch.rand(4, 3, 3, 3), "conv.bias": torch.rand(4), "fc.weight": torch.rand(7, 4)}
    torch.save({"model": {**state, "fc.bias": torch.rand(7)}}, tmp_path / "own.pth")
    assert call("analyze", *own, *images, f"ckpt_path={tmp_path}/own.pth", f"run_dir={tmp_path}/own") == 0
    assert OmegaConf.load(tmp_path / "own" / "config.yaml").model.num_classes == 7
    capsys.readouterr()
    default = {"fc.weight": torch.rand(1000, 4), "fc.bias": torch.rand(1000)}  # fits the network that is told nothing
    torch.save({**state, **default}, tmp_path / "default.pth")
    folders = f"data.root={tmp_path}/images-3 has 3 class folders"
    other = [*images[:1], f"data.root={folder(3)}", *images[2:]]
    for arguments, code, text in (
        (
            [*vit, *other, f"ckpt_path={tmp_path}/vit.pth"],
            4,
            f"made for 7 classes, the model is for 3 ({folders}); use",
        ),
        (
            [*own, *other, f"ckpt_path={tmp_path}/own.pth"],
            4,
            f"made for 7 classes, {folders}; use the data",
        ),
        ([*own, *other, f"ckpt_path={tmp_path}/default.pth"], 4, f"made for 1000 classes, {folders}; use"),
        ([*vit, *other, "model.num_classes=7"], 2, f"model.num_classes=7: data.root={tmp_path}/images-3 has 3 classes"),
        ([*vit, *images, "data.num_classes=3"], 2, "data.num_classes=3: folder has 7 classes"),
        (
            [*vit, "data=folder", f"data.root={tmp_path}/images-none", *MEASURED],
            3,
            f"data.root={tmp_path}/images-none: there is no such folder",
        ),
    ):
        assert call("analyze", *arguments, f"run_dir={tmp_path}/refused") == code
        err = capsys.readouterr().err.strip()
        assert text in err
        assert len(err.splitlines()) == 1, err
