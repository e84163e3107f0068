"""The program of ``docs/figures.md`` and the Python of README run as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

import vitscope as vs
from vitscope.plotting.style import KIND_COLORS, KIND_LABELS

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(blocks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, names: dict) -> dict:
    monkeypatch.chdir(folder)
    with warnings.catch_warnings(), rc_context():
        warnings.simplefilter("ignore")  # few images and directions
        for block in blocks:
            exec(compile(block, "documented", "exec"), names)
    plt.close("all")
    return names


def test_the_page_on_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "figures.md").read_text()
    names = run(_BLOCK.findall(text), tmp_path, monkeypatch, {})
    assert {file.name for file in tmp_path.iterdir()} == {"slices.pdf", "page.pdf", "wide.csv", "wide.npz"}
    result = names["results"]["wide"]
    assert names["curve"].tolist() == result.nll.tolist()
    read = pd.read_csv(tmp_path / "wide.csv", converters={"value": lambda text: float(text or "nan")})
    assert read[read.quantity == "nll"].value.tolist() == result.nll.tolist()
    left, right = names["page"].axes
    assert (left.get_ylabel(), right.get_ylabel(), right.get_title()) == ("NLL (nats)", "Accuracy", "Accuracy")
    for kind in ("conv", "msa", "mlp", "pool", "stem", "head"):
        assert f"{KIND_LABELS[kind]} `{KIND_COLORS[kind]}`" in text


def test_the_lines_of_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(_BLOCK.findall((ROOT / "README.md").read_text()), tmp_path, monkeypatch, {})
    assert isinstance(names["figure"], Figure)
    assert (tmp_path / "fourier.pdf").stat().st_size > 0


def test_a_ratio_in_the_order_asked_for(tmp_path: Path) -> None:
    from tests.fixtures.runs.sample_results import variance

    results = {"ViT-B": variance(), "ResNet-50": variance(2.0)}
    figure = vs.plot(results, order=["ResNet-50"], view="ratio", figsize=(3.3, 4), title=False)
    assert [ax.get_title() for ax in figure.axes] == ["ResNet-50", "ViT-B"]
    assert vs.load_result(results["ViT-B"].save(tmp_path / "vit.npz")) == variance()
