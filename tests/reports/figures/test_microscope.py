"""The microscope: one image through all models, its pictures, reasons where there is none, and a choice in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitscope as vs
from tests.fixtures.runs.report_runs import Given, write_run
from tests.reports.figures.test_html_page import CHROMIUM, WATCH, Page
from vitscope import models as networks
from vitscope.reports import run_index
from vitscope.reports.figures import figure_plan, html_page
from vitscope.reports.figures.figure_captions import DrawnPanel
from vitscope.reports.figures.figure_worker import Picture
from vitscope.reports.figures.microscope import Microscope, microscope
from vitscope.reports.tables import headline_tables
from vitscope.reports.value_lookup import Selection
from vitscope.runs import run_search

NAMES = ("attention_maps", "token_norms", "effective_receptive_field", "patch_pca")


def probe_of(model: nn.Module, **options: Any) -> vs.Probe:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    about = {"mean": [0.5] * 3, "std": [0.2] * 3, "data": "photos", "split": "test", "augmentation": "none"}
    return vs.Probe(model, [(x, torch.zeros(4, dtype=torch.long))], about=about, **options)


def measured(probe: vs.Probe, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images
        return {name: getattr(vs, name)(probe) for name in names}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1), nn.Flatten())
    taps = [vs.Tap(f"conv{i}", "conv", 1, float(i), net[2 * i]) for i in range(2)]
    return {"vit": measured(probe_of(vit)), "convnet": measured(probe_of(net, taps=taps), NAMES[1:])}


def drawn(root: Path, results: dict[str, dict[str, Any]]) -> list[DrawnPanel]:
    for name, of_model in results.items():
        write_run(root / "runs", name, measured=of_model)
    planned = figure_plan.panels(run_index.collect(run_search.every(root / "runs")))
    return [DrawnPanel(panel, Picture(problem="not drawn here"), "") for panel in planned]


def page(root: Path, panels: list[DrawnPanel]) -> Path:
    entries = run_index.collect(run_search.every(root / "runs"))
    tables = {name: headline_tables.build(name, Selection(entries), Given()) for name in headline_tables.TABLES}
    tables["claims"] = tables["models"]
    return html_page.write(root / "report.html", entries, tables, [], panels, [])


def decoded(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def section(root: Path, results: dict[str, dict[str, Any]]) -> Microscope:
    content = microscope(drawn(root, results))
    assert content is not None
    return content


def test_pictures_of_all_measures_and_models(tmp_path: Path, results: dict[str, dict[str, Any]]) -> None:
    content = section(tmp_path, results)
    vit, convnet = (next(i for i, label in enumerate(content.models) if name in label) for name in ("vit", "convnet"))
    assert [title for title, _ in content.rows] == ["Attention", "Token norms", "Receptive field", "Patch PCA"]
    cells = dict(content.rows)
    pca = results["vit"]["patch_pca"]
    assert content.n_images == 4
    for i in range(4):
        np.testing.assert_array_equal(decoded(content.images[i]), pca.images[i])
        np.testing.assert_array_equal(decoded(cells["Patch PCA"][vit].pictures[i]), (255 * pca.colors[i]).round())
    assert cells["Attention"][convnet].text == "no result"
    assert not cells["Attention"][convnet].pictures
    norms = results["vit"]["token_norms"].norms_patch[-1].reshape(4, 4, 4)
    # the darkest and the brightest place of all images are those of the smallest and the largest norm
    pictures = np.stack([decoded(address) for address in cells["Token norms"][vit].pictures]).astype(int)
    assert tuple(pictures.reshape(-1, 3)[norms.argmin()]) == (68, 1, 84)
    assert tuple(pictures.reshape(-1, 3)[norms.argmax()]) == (253, 231, 36)
    assert f"{norms.min():.3g} to {norms.max():.3g}" in cells["Token norms"][vit].text
    assert len(set(cells["Receptive field"][convnet].pictures)) == 1
    assert all(len(pictures) in (0, 4) for pictures in content.pictures())


def test_a_result_without_attention_says_so(tmp_path: Path) -> None:
    none = measured(probe_of(networks.convnet(num_classes=3)), ("attention_maps",))
    ((title, cells),) = section(tmp_path, {"convnet": none}).rows
    assert (title, cells[0].text, cells[0].pictures) == ("Attention", "no attention that can be read", ())


def test_images_are_found_by_their_pixels(tmp_path: Path, results: dict[str, dict[str, Any]]) -> None:
    vit, convnet = results["vit"], dict(results["convnet"])
    pca = convnet["patch_pca"]
    order = [2, 0, 3, 1]
    convnet["patch_pca"] = dataclasses.replace(
        pca, images=pca.images[order], tap_colors=tuple(colors[order] for colors in pca.tap_colors)
    )
    convnet["token_norms"] = dataclasses.replace(
        convnet["token_norms"], card=dataclasses.replace(convnet["token_norms"].card, split="train")
    )
    content = section(tmp_path, {"vit": {"patch_pca": vit["patch_pca"]}, "convnet": convnet})
    place = next(i for i, label in enumerate(content.models) if "convnet" in label)
    cells = dict(content.rows)
    by_image = {decoded(a).tobytes(): decoded(b) for a, b in zip(content.images, cells["Patch PCA"][place].pictures)}
    for image, colors in zip(pca.images, pca.colors):
        np.testing.assert_array_equal(by_image[image.tobytes()], (255 * colors).round())
    assert cells["Token norms"][place].text == "measured on other images"


def test_at_most_six_models_and_none_without_results(tmp_path: Path, results: dict[str, dict[str, Any]]) -> None:
    (tmp_path / "none").mkdir()
    assert microscope([]) is None
    models = ("vit", "convnet", "alternet", "pit", "swin", "convit")
    content = section(tmp_path, {name: {"patch_pca": results["vit"]["patch_pca"]} for name in models})
    assert len(content.models) == 6
    assert not content.left_out
    write_run(tmp_path / "runs", "vit", measured={"patch_pca": results["vit"]["patch_pca"]}, model__depth=9)
    planned = figure_plan.panels(run_index.collect(run_search.every(tmp_path / "runs")))
    content = microscope([DrawnPanel(panel, Picture(problem="x"), "") for panel in planned])
    assert content is not None
    assert len(content.models) == 6
    assert len(content.left_out) == 1


CHOICE = """
<script>
window.addEventListener("load", () => {
  const before = [...document.querySelectorAll("#microscope img")].map((img) => img.src);
  const select = document.getElementById("microscope-image");
  select.value = "2";
  select.dispatchEvent(new Event("change"));
  const after = [...document.querySelectorAll("#microscope img")].map((img) => img.src);
  document.title = JSON.stringify({
    wrong: window.wrong, options: select.options.length, changed: after.filter((src, i) => src !== before[i]).length,
    shown: after.filter((src) => src.startsWith("data:image/png")).length,
    overflow: document.documentElement.scrollWidth > window.innerWidth,
  });
});
</script>
"""


def test_the_page_has_the_section_only_with_results(tmp_path: Path, results: dict[str, dict[str, Any]]) -> None:
    text = page(tmp_path / "with", drawn(tmp_path / "with", results)).read_text()
    found = Page(text)
    assert "#microscope" in found.links
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    data = {facts["id"]: json.loads(body) for facts, body in found.scripts if facts.get("type") == "application/json"}
    assert len(data["microscope-images"]) == 4
    assert len(data["microscope-pictures"]) == 8
    write_run(tmp_path / "without" / "runs", "vit")
    assert 'id="microscope"' not in page(tmp_path / "without", []).read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_an_image_is_chosen_in_chromium(tmp_path: Path, results: dict[str, dict[str, Any]], width: int) -> None:
    text = page(tmp_path, drawn(tmp_path, results)).read_text().replace("<title>", WATCH + "<title>", 1)
    clicked = tmp_path / "clicked.html"
    clicked.write_text(text.replace("</body>", CHOICE + "</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000",
        "--dump-dom", clicked.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    title = re.search(r"<title>(.*?)</title>", ended.stdout)
    assert title is not None
    # the image and six pictures of one image each change; the receptive fields are of all images
    assert json.loads(title[1].replace("&quot;", '"')) == {
        "wrong": [], "options": 4, "changed": 6, "shown": 8, "overflow": False,
    }  # fmt: skip
