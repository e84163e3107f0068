"""Pages of the documentation site: every diagnostic has one, its figure is there, and the Python on all pages runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib import rc_context
from omegaconf import OmegaConf
from PIL import Image

import vitscope as vs
from docs.scripts import diagnostic_pages, draw_figures, reference_pages
from docs.scripts.diagnostic_pages import analyses, read_source
from vitscope.linalg.curvature.curvature_options import CurvatureOptions

ROOT = Path(__file__).parents[2]
#: pages whose blocks of Python are one program, in the order of the page
PROGRAMS = ("index", "quickstart", "concepts", "models")
#: diagnostics whose example takes less than about half a second of one core
QUICK = ("evaluation", "fourier", "hessian_trace", "loss_barrier", "taps", "token_norms")
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_program(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with warnings.catch_warnings(), rc_context():
        warnings.simplefilter("ignore")  # few images: intervals are undefined
        exec(compile(code, "page", "exec"), {})
    plt.close("all")


@pytest.mark.parametrize("analysis", analyses())
def test_a_diagnostic_has_a_page_and_a_figure(analysis: str) -> None:
    source = read_source(analysis)
    assert set(source.figure.models) <= set(draw_figures.RUNS)
    file = diagnostic_pages.FIGURES / f"{analysis}.webp"
    assert file.is_file(), f"analysis={analysis} has no figure: run `{diagnostic_pages.figure_command(source)}`"
    with Image.open(file) as image:
        assert max(image.size) <= draw_figures.SIZE


def test_figures_are_small_and_each_has_a_page() -> None:
    files = list(diagnostic_pages.FIGURES.iterdir())
    assert sum(file.stat().st_size for file in files) <= draw_figures.LIMIT
    assert {file.stem for file in files} <= set(analyses())


def test_every_source_belongs_to_a_diagnostic() -> None:
    assert {file.stem for file in diagnostic_pages.SOURCES.glob("*.md")} == {"index", *analyses()}


@pytest.mark.parametrize(
    "analysis", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in analyses()]
)
def test_the_example_of_a_page_runs(analysis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_program(diagnostic_pages.example(read_source(analysis)), tmp_path, monkeypatch)
    assert list(tmp_path.glob("*.pdf")), "the example saves no figure"


@pytest.mark.parametrize("analysis", analyses())
def test_the_example_and_the_figure_of_a_page_name_options_that_exist(analysis: str) -> None:
    source = read_source(analysis)
    calls = [node for node in ast.walk(ast.parse(diagnostic_pages.example(source))) if isinstance(node, ast.Call)]
    for call in calls:
        if (
            isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "vs"
        ):
            function = getattr(vs, call.func.attr)
            if call.func.attr != "plot":  # passes options on
                accepted = inspect.signature(function).parameters.keys() | {
                    field.name for field in dataclasses.fields(CurvatureOptions)
                }
                assert {keyword.arg for keyword in call.keywords} <= accepted, call.func.attr
    options = diagnostic_pages.composed()
    for override in source.figure.overrides:
        assert OmegaConf.select(options, override.partition("=")[0].lstrip("+"), default=options) is not options, (
            override
        )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "concepts" else pytest.mark.slow) for name in PROGRAMS]
)
def test_the_program_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _PYTHON.findall((ROOT / "docs" / f"{name}.md").read_text())
    assert blocks
    run_program("\n".join(blocks), tmp_path, monkeypatch)


def test_a_diagnostic_without_a_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostic_pages, "SOURCES", tmp_path)
    monkeypatch.setattr(diagnostic_pages, "ROOT", tmp_path)
    with pytest.raises(
        ValueError, match=r"^analysis=cka has no page: write cka\.md with the sections Definition, "
    ) as error:
        read_source("cka")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("## Cost", "## Costs", r"expected text in the sections \['Definition', .*received .*'Costs'"),
        ("topic: Similarity and depth", "topic: Depth", "topic=Depth is unknown; choose from Curvature"),
        ("question:", "ask:", r"expected the keys \[.*'question'.*received \['ask'"),
        ("```python", "```text", "expected a block of Python in the section Example"),
        ("\n---\n", "\n", "expected YAML between two lines ---"),
    ],
)
def test_a_source_that_lacks_a_part_is_named(
    old: str, new: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (diagnostic_pages.SOURCES / "cka.md").read_text()
    assert old in source
    (tmp_path / "cka.md").write_text(source.replace(old, new))
    monkeypatch.setattr(diagnostic_pages, "SOURCES", tmp_path)
    monkeypatch.setattr(diagnostic_pages, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=rf"^cka\.md: {text}"):
        read_source("cka")


def test_a_page_has_every_option_with_its_default_and_meaning() -> None:
    page = diagnostic_pages.render("hessian")
    for row in (
        "| `solver` | `lanczos` | power: power iteration with PyHessian's stopping rule |",
        "| `probe.n_images` | `48` |",
        "| `n_ends` | `0` | also this many of the largest and of the smallest eigenvalues |",
    ):
        assert row in page
    assert "::: vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum.HessianMaxEigenvalueSpectrumResult" in page


def test_a_caption_has_code_as_elements_of_html() -> None:
    # Markdown is not read inside of <figcaption>
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", diagnostic_pages.render("hessian"), re.DOTALL)
    assert len(captions) == 1
    assert "`" not in captions[0]
    assert "<code>photos</code>" in captions[0]


def test_every_option_of_every_diagnostic_has_a_meaning() -> None:
    empty = {
        (analysis, line)
        for analysis in analyses()
        for line in diagnostic_pages.options(analysis).splitlines()
        if line.endswith("|  |")
    }
    assert not empty


def test_exit_codes_are_those_of_the_error_classes() -> None:
    rows = reference_pages.error_rows()
    assert {code for code, _, _ in rows} == {2, 3, 4, 5, 6, 7}
    assert "| 3 | `DataError` | Data that is missing, unreadable or does not fit. |" in reference_pages.error_table()


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[a](../CONTRIBUTING.md) [b](../../SECURITY.md#x) [c](tutorials/own_network.ipynb) [d](../README.md)"
    rewritten = reference_pages.rewrite_links(text, "tutorials/x.md")
    assert rewritten == "[a](../contributing.md) [b](../security.md#x) [c](tutorials/own_network.md) [d](../index.md)"
