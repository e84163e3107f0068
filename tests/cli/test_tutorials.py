"""The tutorials of docs/tutorials are executed as they stand, with smaller networks and data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from matplotlib import rc_context
from PIL import Image

from vitscope.cli import exit_codes, report

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(name: str, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall((FOLDER / name).read_text()) if found == language]


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks(name, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def execute(code: list[str]) -> dict[str, object]:
    names: dict[str, object] = {}
    with warnings.catch_warnings(), rc_context():
        warnings.simplefilter("ignore")  # few images: intervals are undefined
        for cell in code:
            exec(compile(cell, "tutorial", "exec"), names)
    plt.close("all")
    return names


def write_photos(folder: Path) -> None:
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog", "tree"):
            (folder / split / label).mkdir(parents=True)
            for number in range(2):
                image = pixels.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / split / label / f"{number}.jpg")


@pytest.mark.filterwarnings("ignore:.*(the split of folder has 6 images|fewer than 128 images|null for)")
@pytest.mark.slow
def test_own_checkpoints(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"))
    resnet, vit = (
        timm.create_model("test_resnet", num_classes=3),
        timm.create_model("test_vit", num_classes=3, img_size=64),
    )
    torch.save({"state_dict": resnet.state_dict(), "epoch": 3, "arch": "test_resnet"}, "resnet.pth.tar")
    torch.save(vit.state_dict(), "vit.pth")
    smaller = {
        "model.name=resnet18": "model.name=test_resnet",
        "model.name=vit_tiny_patch16_224": "model.name=test_vit",
    }
    sizes = ["data.image_size=64", "analysis.slice.n=3", "data.num_workers=0", "device=cpu"]
    for _, command, *arguments in commands("own_checkpoints.md"):
        if command == "analyze":
            assert call(command, *(smaller.get(argument, argument) for argument in arguments), *sizes) == 0
            err = capsys.readouterr().err
            assert "not augmented (default for ckpt_path=" in err
            assert "no weight decay (default for ckpt_path=" in err
        else:
            assert command == "report"
            monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
            assert exit_codes.run_command(report._command) == 0, capsys.readouterr().err
    figures = {path.name for path in Path("figures").iterdir()}
    for analysis in ("fourier", "variance", "slice", "evaluation"):
        assert {f"{analysis}-newest.{ending}" for ending in ("pdf", "png", "csv")} <= figures
    assert "report.html" in figures
    rows = pd.read_csv("figures/tables/models.csv")
    assert rows["model"].tolist() == ["ViT-Ti", "ResNet-18"]
    execute(blocks("own_checkpoints.md", "python"))
    assert Path("slices.pdf").stat().st_size > 0
    assert set(pd.read_csv("slices.csv")["model"]) == {"ResNet-18", "ViT-Ti"}


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((FOLDER / "own_network.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names = execute(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    printed = capsys.readouterr().out
    assert re.search(r"body\.2 +msa", printed)
    assert len(re.findall(r"body\.\d\S* +conv", printed)) == 2
    assert names["path"] == Path("fourier.npz")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure"),
    [("comparing_models", "comparison.pdf"), ("reading_report", "depth.pdf"), ("sweep_to_table", "rates.pdf")],
)
def test_a_notebook_ends_in_its_figure(
    name: str, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITSCOPE_RUNS", raising=False)
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    names = execute(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    assert Path(figure).stat().st_size > 0
    printed = capfd.readouterr().out
    if name == "comparing_models":
        assert "differ in weight_decay: 0.05 and 0.0" in printed
        accuracy = names["accuracy"]
        assert isinstance(accuracy, dict)
        assert min(accuracy.values()) > 0.3  # chance 0.1
    else:
        table = names["models" if name == "reading_report" else "table"]
        assert isinstance(table, pd.DataFrame)
        assert len(table) == 2
        assert table["test/accuracy"].between(0, 1).all()


@pytest.mark.slow
def test_a_data_set_on_several_gpus(tmp_path: Path) -> None:
    """The dry run, a sweep of two trials side by side on the CPU, and the table."""
    sweep = blocks("cifar100.md", "yaml")[0]
    for text, smaller in (("[convnet, vit, alternet]", "[vit]"), ("[0, 1, 2]", "[0, 1]"), ("cifar100", "digits")):
        assert text in sweep
        sweep = sweep.replace(text, smaller)
    (tmp_path / "models.yaml").write_text(sweep)
    smaller_words = {
        "profile=cifar100": "profile=smoke", "seeds=3": "seeds=1", "gpus=0,1,2,3": "jobs=2",
        "analysis=[hessian,calibration]": "analysis=[calibration]", "expect.models=[convnet,vit,alternet]": "expect.models=[vit]",
        "expect.seeds=[0,1,2]": "expect.seeds=[0,1]",
    }  # fmt: skip
    for program, command, *arguments in commands("cifar100.md"):
        arguments = [smaller_words.get(argument, argument) for argument in arguments]
        if command == "sweep":
            arguments += ["caps=smoke", "model.depth=1", "model.patch_size=8", "logger=none"]
        if command == "report":
            (folder,) = (tmp_path / "runs" / "sweeps").glob("models-*")
            arguments = [argument.replace("runs/sweeps/models-<hash>", str(folder)) for argument in arguments]
        assert program == "vitscope"
        words = [sys.executable, "-m", "vitscope", command, *arguments]
        ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert ended.returncode == 0, (words, ended.stderr[-2000:])
        if command == "reproduce":
            assert "table-models" in ended.stdout
    runs = pd.read_csv(tmp_path / "figures" / "tables" / "models-runs.csv")
    assert runs["seed"].tolist() == [0, 1]
    assert not np.isnan(runs["test/accuracy"].to_numpy(dtype=float)).any()
