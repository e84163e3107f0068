"""Make the page of each diagnostic from its source in ``docs/diagnostics``, the comments of ``conf/analysis`` and docstrings.

A source, ``docs/diagnostics/<analysis>.md``, begins with a block of YAML between two lines ``---`` (see `PageSource`) and
has the sections of `SECTIONS`, written by hand. The table of options, the figure with its caption, the command and the
reference of the function are added when the site is built, so that they cannot differ from the code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from omegaconf import DictConfig

import vitscope as vs
from vitscope.cli import help_text
from vitscope.config import hydra_internals, loading
from vitscope.config.keys.key_comments import comments_of

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "docs" / "diagnostics"
FIGURES = ROOT / "docs" / "figures"
#: headings of every source, in this order; ``Command`` is optional
SECTIONS = ("Definition", "How to read it", "Example", "Cost", "Pitfalls")
#: topics in the order of the navigation
TOPICS = (
    "Curvature", "Loss landscape", "Frequency", "Feature maps and tokens", "Attention", "Similarity and depth",
    "Robustness and calibration", "Structure",
)  # fmt: skip
#: the first lines of every example: a network and images from which the other lines start
EXAMPLE_OPENING = """\
import torch
import vitscope as vs

torch.manual_seed(0)
model = vs.models.vit(size="tiny", patch_size=8, depth=2, num_classes=10)  # any nn.Module
images, labels = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
probe = vs.Probe(model, [(images, labels)])
"""
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class FigureSource:
    """Settings of the figure of a diagnostic.

    Attributes:
        caption: Sentences that say what is seen in the figure.
        models: Names of the runs that are drawn: ``convnet`` and ``vit`` on `photos`, ``shapes`` (a ConvNet on `shapes`).
        overrides: Settings of the measurement.
        plot: Options of ``vs.plot``.
    """

    caption: str
    models: Sequence[str] = ("convnet", "vit")
    overrides: Sequence[str] = ()
    plot: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PageSource:
    """Source of a page.

    Attributes:
        analysis: Name of the file in ``conf/analysis``.
        title: Title of the page.
        topic: One of `TOPICS`.
        question: The question that the diagnostic answers, in one sentence.
        figure: Settings of its figure.
        sections: Text of each section by its heading.
    """

    analysis: str
    title: str
    topic: str
    question: str
    figure: FigureSource
    sections: dict[str, str]


def analyses() -> list[str]:
    """Return the names of all diagnostics: the files of ``conf/analysis``."""
    return loading.options("analysis")


@functools.cache
def target(analysis: str) -> str:
    """Return the name of the function that an analysis calls, such as ``hessian_trace``."""
    text = (loading.folder() / "analysis" / f"{analysis}.yaml").read_text(encoding="utf-8")
    return str(yaml.safe_load(text)["_target_"]).removeprefix("vitscope.")


def read_source(analysis: str) -> PageSource:
    """Read the source of a page.

    Raises:
        ValueError: There is no source, or it lacks a key, a section or an example. The text names the file.
    """
    file = SOURCES / f"{analysis}.md"
    name = file.relative_to(ROOT)
    if not file.is_file():
        raise ValueError(f"analysis={analysis} has no page: write {name} with the sections {', '.join(SECTIONS)}")
    _, _, rest = file.read_text(encoding="utf-8").partition("---\n")
    header, separator, body = rest.partition("\n---\n")
    if not separator:
        raise ValueError(f"{name}: expected YAML between two lines ---, received none; copy those of cka.md")
    keys = yaml.safe_load(header)
    wanted = {f.name for f in fields(PageSource)} - {"analysis", "sections"}
    if set(keys) != wanted:
        raise ValueError(f"{name}: expected the keys {sorted(wanted)}, received {sorted(keys)}")
    if keys["topic"] not in TOPICS:
        raise ValueError(f"{name}: topic={keys['topic']} is unknown; choose from {', '.join(TOPICS)}")
    parts = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
    sections = {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2])}
    if parts[0].strip() or tuple(sections) != SECTIONS or not all(sections.values()):
        raise ValueError(f"{name}: expected text in the sections {list(SECTIONS)} alone, received {list(sections)}")
    figure = FigureSource(**keys.pop("figure"))
    source = PageSource(analysis, figure=figure, sections=sections, **keys)
    if not _blocks(source, "python"):
        raise ValueError(f"{name}: expected a block of Python in the section Example, received none")
    return source


def _blocks(source: PageSource, language: str) -> list[str]:
    return [text for name, text in _FENCE.findall(source.sections["Example"]) if name == language]


def example(source: PageSource) -> str:
    """Return the example of a page as one program."""
    return EXAMPLE_OPENING + "\n" + "\n".join(_blocks(source, "python"))


def commands(source: PageSource) -> str:
    """Return the shell commands of a page: its own ones, else the one that measures a run."""
    written = "".join(_blocks(source, "bash"))
    return written or f"python analyze.py run=runs/<id> 'analysis=[{source.analysis}]'\n"


@functools.cache
def composed() -> DictConfig:
    """Return the configuration of `analyze` with every diagnostic."""
    with hydra_internals.composing_from(str(loading.folder()), "analyze"):
        return compose("analyze", overrides=[f"analysis=[{','.join(analyses())}]"])


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").strip()


def rows_as_table(rows: Sequence[tuple[str, str]], prefix: str = "") -> str:
    """Return ``key=value`` rows with comments as a Markdown table of three columns.

    Args:
        rows: Pairs of ``key=value`` and comment, as `vitscope.cli.help_text` returns them.
        prefix: Beginning of the keys that is left out.
    """
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for assignment, comment in rows:
        key, _, value = assignment.partition("=")
        code = f"`{value}`".replace("|", "\\|") if value else ""
        lines.append(f"| `{key.removeprefix(prefix)}` | {code} | {cell(comment)} |")
    return "\n".join(lines) + "\n"


def options(analysis: str) -> str:
    """Return the table of a diagnostic's options, from the comments of its configuration file and the docstring."""
    file = loading.folder() / "analysis" / f"{analysis}.yaml"
    return rows_as_table(help_text.choice_rows(composed(), "analysis", file), f"analysis.{analysis}.")


def summary(analysis: str) -> str:
    """Return the first sentence of a diagnostic's configuration file."""
    description = comments_of(loading.folder() / "analysis" / f"{analysis}.yaml").description
    return re.split(r"(?<=\.)\s+(?=[A-Z])", description)[0]


def figure_command(source: PageSource) -> str:
    """Return the command that draws the figure of a page."""
    return f"python docs/scripts/draw_figures.py {source.analysis}"


def _figure(source: PageSource) -> str:
    # a figure that is not drawn yet leaves no broken link; a test names it
    if not (FIGURES / f"{source.analysis}.webp").is_file():
        return ""
    caption = re.sub(
        r"`([^`]+)`", r"<code>\1</code>", source.figure.caption.strip()
    )  # Markdown is not read in a caption
    return (
        f'<figure markdown="span">\n  ![{source.title}](../figures/{source.analysis}.webp)\n'
        f"  <figcaption>{caption} Drawn by <code>{figure_command(source)}</code>.</figcaption>\n</figure>\n"
    )


def _example_tabs(source: PageSource) -> str:
    text = _FENCE.sub("", source.sections["Example"]).strip()
    tabs = (("Command line", "bash", commands(source)), ("Python", "python", example(source)))
    parts = []
    for title, language, code in tabs:
        block = f"```{language}\n{code.rstrip()}\n```"
        parts.append(f'=== "{title}"\n\n' + "\n".join(f"    {line}".rstrip() for line in block.splitlines()))
    return f"{text}\n\n" * bool(text) + "\n\n".join(parts) + "\n"


def _reference(analysis: str) -> str:
    """Return the directives of mkdocstrings for a measure's function and its result."""
    module = vs.measures()[target(analysis)]
    text = Path(ROOT, "src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    classes = re.findall(r"^class (\w+Result)\(", text, re.MULTILINE)
    names = [target(analysis), *classes]
    return "\n\n".join(f"::: {module}.{name}" for name in names) + "\n"


def render(analysis: str) -> str:
    """Return the page of a diagnostic as Markdown."""
    source = read_source(analysis)
    function = target(analysis)
    page = [
        f"# {source.title}\n",
        f"**{source.question.strip()}**\n",
        f"`analysis={analysis}` on the command line, `vs.{function}` in Python.\n",
        _figure(source),
    ]
    for heading in SECTIONS:
        if heading == "Cost":  # the table stands between the example and the cost
            page += ["## Options\n", f"Keys of `analysis.{analysis}` and their defaults.\n", options(analysis)]
        text = _example_tabs(source) if heading == "Example" else source.sections[heading] + "\n"
        page += [f"## {heading}\n", text]
    page += ["## Reference\n", _reference(analysis)]
    return "\n".join(page)


def by_topic() -> dict[str, list[PageSource]]:
    """Return the sources of all pages by topic, in the order of the navigation."""
    sources = [read_source(name) for name in analyses()]
    return {topic: [source for source in sources if source.topic == topic] for topic in TOPICS}


def index() -> str:
    """Return the tables of all diagnostics, one for each topic."""
    parts = []
    for topic, sources in by_topic().items():
        parts.append(f"## {topic}\n\n| diagnostic | `analysis=` | question |\n|---|---|---|")
        parts += [f"| [{s.title}]({s.analysis}.md) | `{s.analysis}` | {cell(s.question)} |" for s in sources]
        parts.append("")
    return "\n".join(parts)
