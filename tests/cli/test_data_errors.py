"""Data that cannot be used end the command with exit code 3 and one line, from the main process and from workers alike."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from torch.utils.data import get_worker_info

from tests.fixtures.runs.run_folders import only_run
from vitscope.data import loader

#: the module: the package has a function of the same name
timm_model = importlib.import_module("vitscope.models.timm_model")
MODEL = ["model=vit", "model.depth=1", "model.patch_size=8", "logger=none", "analysis=[]", "trainer.accelerator=cpu",
         "trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write 3 classes of 12 images each."""
    draws = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def folder(images: Path, workers: int) -> list[str]:
    return [*MODEL, "data=folder", f"data.root={images}", "data.num_classes=3", "data.image_size=32", "data.batch_size=4",
            f"data.num_workers={workers}", "data.augment=none", f"paths.runs={images.parent}/runs"]  # fmt: skip


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_an_image_that_cannot_be_read(call, images, tmp_path, capsys, workers, damage) -> None:
    for file in images.glob("a/*.png"):  # wherever the split puts them, training meets one
        whole = file.read_bytes()
        file.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage])
    assert call("train", *folder(images, workers)) == 3
    line = one_error(capsys)
    assert line.startswith("error: data.root: ")
    assert str(images / "a") in line
    assert "Traceback" in (only_run(tmp_path) / "log.txt").read_text()


def test_a_worker_that_is_killed(call, images, capsys, monkeypatch) -> None:
    def killed(self: loader.Augmented, draw: loader.Draw) -> None:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loader.Augmented, "__getitems__", killed)
    assert call("train", *folder(images, 2)) == 3
    assert one_error(capsys).startswith("error: data.num_workers=2: a loader worker was killed")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["data=digits", "data.batch_size=100000", "data.drop_last=true"], 3, "error: data.batch_size=100000: "),
        (
            ["data=digits", "data.num_classes=7", "model.num_classes=7"],
            2,
            "error: data.num_classes=7: digits has 10 classes",
        ),
        (["data=cifar10", "data.root={tmp}"], 3, "error: data.root={tmp}: "),
        (["data=folder", "data.root={tmp}/none"], 3, "error: data.root={tmp}/none: there is no such folder"),
        (["data=folder", "data.root={tmp}"], 3, "error: data.root={tmp}: "),
        (
            ["data=digits", "trainer.limit_train_batches=0.0001"],
            2,
            "error: trainer.limit_train_batches=0.0001: no batch",
        ),
    ],
)
def test_found_before_there_is_a_run(call, tmp_path, capsys, monkeypatch, arguments, code, text) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert call("train", *MODEL, f"paths.runs={tmp_path}/runs", *given) == code
    assert one_error(capsys).startswith(text.format(tmp=tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_set_whose_files_differ_from_the_published_ones(call, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(b"something else")
    assert call("train", *MODEL, f"paths.runs={tmp_path}/runs", "data=cifar10", f"data.root={tmp_path}") == 3
    assert "differ from the published files and no network" in one_error(capsys)


def test_pretrained_weights_without_a_network(call, tmp_path, capsys, monkeypatch) -> None:
    """Nobody listens: one attempt to connect, no retries, exit 3."""
    tried = []
    reach = timm_model.socket.create_connection
    monkeypatch.setattr(timm_model.socket, "create_connection", lambda *a, **k: tried.append(a) or reach(*a, **k))
    monkeypatch.setattr(timm_model, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    arguments = [
        "model=timm",
        "model.name=resnet18",
        "model.pretrained=true",
        "data=digits",
        f"paths.runs={tmp_path}/runs",
    ]
    assert call("train", *arguments, "logger=none") == 3
    assert one_error(capsys).startswith("error: model.pretrained=")
    assert len(tried) == 1
    assert not (tmp_path / "runs").exists()
