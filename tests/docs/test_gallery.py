"""The gallery and README's pictures: the right runs are drawn, the page is what its entries give, and files are small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import vitscope as vs
from docs.scripts import draw_gallery, draw_story, gallery_page, study_runs
from docs.scripts.cifar_resnet import CifarResNet
from docs.scripts.page_images import LIMIT, SIZE
from docs.scripts.structure_figure import draw_structures
from tests.fixtures.runs.report_runs import other_card, spectrum, write_run

ROOT = Path(__file__).parents[2]
CARD = other_card(data="CIFAR-10 (JPEG)")
WEAK, STRONG = (yaml.safe_load((ROOT / f"conf/objective/{name}.yaml").read_text()) for name in ("weak", "strong"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with runs of a study: seed 0 lacks the AlterNet, seed 1 is whole."""

    def write(model: str, seed: int, ape: float, **changes: Any) -> None:
        measured = changes.pop("measured", {"hessian": spectrum(0.1, ape, CARD)})
        changes = {"objective": WEAK, "data__name": "CIFAR-10 (JPEG)", **changes}
        write_run(tmp_path / "runs", model, seed, measured=measured, **changes)

    for seed, models in ((0, ("convnet", "vit")), (1, ("convnet", "vit", "alternet"))):
        for model in models:
            write(model, seed, 100.0 + seed)
    write(
        "alternet", 0, 1.0, objective=STRONG
    )  # another recipe, a part of the data, a number of steps, another placement
    write("alternet", 0, 2.0, data__fraction=0.1)
    write("alternet", 0, 3.0, trainer__max_steps=10)
    write("alternet", 0, 4.0, model__placement="stage_start")
    write("alternet", 0, 5.0, facts={"status": "failed"})
    for mixer in ("msa", "conv", "uniform", "blur"):
        write("alternet", 2, 6.0, model__mixer=mixer, measured={"hessian": spectrum(0.1, 6.0, CARD)})
    return tmp_path / "runs"


def test_runs_of_other_recipes_data_lengths_and_placements_are_not_taken(runs: Path) -> None:
    entries = study_runs.finished_runs(runs)
    assert study_runs.find_run(entries, "alternet", 0) is None
    assert study_runs.common_seed(entries, draw_story.FAMILIES) == 1
    entry = study_runs.find_run(entries, "alternet", 1, "hessian")
    assert entry is not None
    file = study_runs.measured_file(entry, "hessian")
    assert file is not None
    assert vs.load_result(file).average_positive_eigenvalue == 101.0
    assert study_runs.find_run(entries, "alternet", 1, "cka") is None
    blur = study_runs.find_run(entries, "alternet", 2, "hessian", mixer="blur")
    assert blur is not None
    assert blur.config["model"]["mixer"] == "blur"


def test_the_pictures_name_the_data_and_their_conditions(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probes: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr(draw_story.vs, "load_probe", lambda run, **images: probes.append((run, images)))
    measured = draw_story.Picture(
        "", "Other", measure=lambda probe, n: spectrum(0.2, 10.0 * n, CARD), settings={"n": 2}
    )
    others = [dataclasses.replace(measured, name=name) for name in ("landscape", "fourier")]
    monkeypatch.setattr(draw_story, "PICTURES", (draw_story.PICTURES[0], *others))
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n\n<!-- story -->\nold\n<!-- end of story -->\n\nafter\n")
    words = [
        "--runs",
        str(runs),
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
        "--readme",
        str(readme),
    ]
    assert draw_story.main(words) == 0
    text = readme.read_text()
    assert text.startswith("# Before\n\n<!-- story -->\n")
    assert text.endswith("<!-- end of story -->\n\nafter\n")
    assert "old" not in text
    assert "(out/spectrum.webp)" in text
    assert "CIFAR-10 (JPEG)" in text
    assert "after 3 epochs, seed 1, test accuracy ConvNet 0.50, ViT 0.50, AlterNet 0.50" in text
    facts = json.loads((tmp_path / "out" / "story.json").read_text())
    assert facts["seed"] == 1
    assert list(facts["accuracy"]) == ["ConvNet", "ViT", "AlterNet"]
    assert (tmp_path / "out" / "spectrum.webp").is_file()
    assert len(probes) == 6
    assert draw_story.main(words) == 0
    assert len(probes) == 6, "a result of the cache was measured again"
    assert draw_story.main([*words, "--seed", "0"]) == 3
    assert "expected finished runs of convnet, vit, alternet with one seed" in capsys.readouterr().err


def test_the_gallery_draws_what_is_there_and_names_what_is_not(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = tuple(entry for entry in draw_gallery.STUDY if entry.file in ("mixers", "corruption"))
    monkeypatch.setattr(draw_gallery, "STUDY", shown)
    out = tmp_path / "docs" / "gallery"
    assert draw_gallery.main(["--runs", str(runs), "--out", str(out)]) == 3
    assert "missing: corruption: no seed" in capsys.readouterr().err
    text = json.loads((out / "study-mixers.json").read_text())
    assert list(text["card"]["checkpoints"]) == ["AlterNet", "AlterNet, conv", "AlterNet, uniform", "AlterNet, blur"]
    page = (tmp_path / "docs" / "gallery.md").read_text()
    assert "![Leading Hessian eigenvalues with and without attention](gallery/study-mixers.webp)" in page
    assert "Seed 2" in page
    with Image.open(out / "study-mixers.webp") as image:
        assert max(image.size) <= SIZE


def test_the_committed_page_is_what_its_entries_give() -> None:
    out = draw_gallery.OUT
    texts = gallery_page.read_texts(out)
    assert gallery_page.page_text(texts, out.name) == (out.parent / "gallery.md").read_text()
    assert {file.stem for file in out.glob("*.webp")} == {text["name"] for text in texts}
    for text in texts:
        assert (out / f"{text['name']}.webp").stat().st_size <= LIMIT
        assert text["card"]
        assert text["command"]
        if text["group"] != "timm":
            assert text["card"]["data"] == "CIFAR-10 (JPEG)"
        else:
            assert "random weights" in text["title"]


def test_the_resnet_has_the_published_size_and_shapes() -> None:
    network = CifarResNet()
    assert sum(p.numel() for p in network.parameters()) == 269_722  # of batch normalization too
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [unit.name for unit in vs.structure(network).units] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    # option A: the new channels are zero, half of them on each side
    block = network.layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_a_structure_is_drawn_with_its_units() -> None:
    figure = draw_structures({"ResNet-20": vs.structure(CifarResNet())})
    (axes,) = figure.axes
    assert len(axes.patches) == 9
    assert axes.get_title(loc="left") == "ResNet-20: 9 units, 0.3 M parameters"
