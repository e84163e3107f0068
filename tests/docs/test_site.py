"""The documentation site: built in strict mode, complete, and usable from disk without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.scripts import diagnostic_pages
from docs.scripts.diagnostic_pages import analyses, target

pytest.importorskip("material", reason="the site needs the extra docs")
pytest.importorskip("latex2mathml", reason="the site needs the extra docs")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site; links and anchors that lead nowhere are errors."""
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def test_each_diagnostic_is_a_page_with_figure_formula_options_and_reference(site: Path) -> None:
    index = (site / "diagnostics/index.html").read_text()
    for analysis in analyses():
        page = (site / f"diagnostics/{analysis}.html").read_text()
        assert f'href="{analysis}.html"' in index
        assert f'src="../figures/{analysis}.webp"' in page
        assert (site / f"figures/{analysis}.webp").is_file()
        assert "<code>probe.n_images</code>" in page
        assert f'id="{diagnostic_pages.vs.measures()[target(analysis)]}.{target(analysis)}"' in page
        if "$$" in "".join(diagnostic_pages.read_source(analysis).sections.values()):
            assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page


def test_formulas_are_all_converted(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "arithmatex" not in text, page
        formulas = re.findall(r"<math .*?</math>", text, re.DOTALL)
        assert not [formula for formula in formulas if re.search(r"<m[io]>\\", formula)], page


def test_nothing_is_fetched_from_a_server(site: Path) -> None:
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(https?:)?//|<link[^>]* rel="?(?:stylesheet|preconnect)[^>]* href="(https?:)?//'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    assert [page for page in pages if loaded.search(page.read_text())] == []
    assert (site / "assets/iframe-worker/shim.js").is_file()
    assert (site / "search/search_index.js").stat().st_size > 100_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_search_works_from_disk(site: Path) -> None:
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             "--virtual-time-budget=20000", "--dump-dom", f"file://{site}/index.html?q=barrier"]  # fmt: skip
    page = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout
    assert re.search(r'class="md-search-result__meta">\d+ matching documents', page)
    assert "diagnostics/loss_barrier.html" in page
