"""Hooks of MkDocs: generated pages, the navigation of the diagnostics, links of the repository, and formulas as MathML.

MathML is drawn by browsers themselves, so that formulas need no script, no fonts and no network.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[2]))
from docs.scripts import diagnostic_pages, reference_pages

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the diagnostics, one group for each topic, in the place of the navigation's entry ``Diagnostics``."""
    topics: list[Any] = ["diagnostics/index.md"]
    for topic, sources in diagnostic_pages.by_topic().items():
        topics.append({topic: [f"diagnostics/{source.analysis}.md" for source in sources]})
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Diagnostics" in entry:
            entry["Diagnostics"] = topics
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in ``docs/`` holds."""
    for path, text in reference_pages.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the page of a diagnostic from its source, and fill in what other pages have generated."""
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    if folder == "diagnostics" and name in diagnostic_pages.analyses():
        return diagnostic_pages.render(name)
    if page.file.src_uri == "diagnostics/index.md":
        markdown += diagnostic_pages.index()
    return reference_pages.rewrite_links(reference_pages.fill(markdown), page.file.src_uri)


def mathml(match: re.Match[str]) -> str:
    """Return one formula of the page as MathML."""
    latex = html.unescape(match["latex"])
    return convert(latex.strip(), display="block" if match["open"] == "[" else "inline")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the formulas of a page by MathML."""
    return _FORMULA.sub(mathml, html)
