"""The page: one file without a word to the network, every figure with its card, and a click through it in a browser."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.runs.report_runs import CARD, curve, other_card, rise, spectrum, write_run
from vitscope.diagnostics.landscape.loss_landscape import LossLandscapeResult
from vitscope.reports import run_entry, run_index
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.figures import figure_captions, figure_plan, figure_worker, html_page
from vitscope.reports.model_costs import Cost, Costs
from vitscope.reports.tables import headline_tables
from vitscope.reports.value_lookup import Selection
from vitscope.runs import run_search

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
HOSTILE = "</script><script>alert(1)</script><b>&amp;"


class Given(Costs):
    def of(self, entry: run_entry.Entry) -> Cost:
        return Cost(1_000_000, 2_000_000)


class Page(HTMLParser):
    """Collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.figures: list[dict[str, int]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.metas: list[dict[str, str | None]] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if facts.get("id"):
            self.ids.append(str(facts["id"]))
        self.links += [str(facts["href"])] if facts.get("href") else []
        self.sources += [str(facts["src"])] if facts.get("src") else []
        self.labels += [str(facts["for"])] if facts.get("for") else []
        if tag == "figure":
            self.figures.append({"img": 0, "objective-card": 0, "alt": 0})
        if self.figures and tag == "img":
            self.figures[-1]["img"] += 1
            self.figures[-1]["alt"] += bool(facts.get("alt"))
        if self.figures and "objective-card" in (facts.get("class") or ""):
            self.figures[-1]["objective-card"] += 1
        if tag == "meta":
            self.metas.append(facts)
        if tag == "script":
            self.scripts.append((facts, ""))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open:
            self.styles.append(data)


def surface() -> LossLandscapeResult:
    """Return a bowl."""
    x = np.linspace(-1, 1, 5)
    z = 1 + x[:, None] ** 2 + x[None] ** 2
    return LossLandscapeResult(
        x=x, y=x, nll=z, l2_half_sq=z, l2_sum_norm=z, accuracy=0.1 * z, ece=0.1 * z, directions="random",
        normalization="filter", preset="", direction_norms=np.ones(2), direction_cosine=0.0, weight_norm=1.0,
        n_nonfinite=0, dtype_error=None, labels=(), path=np.zeros((0, 2)), projection_error=np.zeros(0), card=CARD,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a few runs, one with a hostile name and one that failed."""
    root = tmp_path_factory.mktemp("page")
    make_run = functools.partial(write_run, root / "runs")
    make_run("alternet", 0, measured={"hessian": spectrum(), "slice": curve(), "landscape": surface()})
    make_run("convnet", 0, measured={"hessian": spectrum(0.0, 200.0), "slice": curve(), "sharpness": rise(0.1)})
    make_run("vit", 0, model__size=HOSTILE, measured={"slice": curve(other_card(data=HOSTILE))})
    make_run(
        "vit", 1, model__size=HOSTILE, measured={"hessian": f"ValueError: {HOSTILE}"}, metrics={"test/nll": np.nan}
    )
    return build(root)


def build(root: Path) -> Path:
    entries = run_index.collect(run_search.every(root / "runs"))
    selection = Selection(entries)
    made = {name: headline_tables.build(name, selection, Given()) for name in headline_tables.TABLES}
    judged = claim_verdicts.judge(ReportRuns(selection, Given()))
    made["claims"] = claim_verdicts.table(judged)
    chosen = figure_plan.panels(entries)
    drawn = [
        figure_captions.with_picture(panel, figure_worker.draw(figure_captions.drawing_job(panel, root / "out")))
        for panel in chosen
    ]
    problems = [p for table in made.values() for p in table.problems]
    return html_page.write(root / "out" / "report.html", entries, made, judged, drawn, problems)


def test_the_page_stands_alone_and_is_whole(written: Path) -> None:
    text = written.read_text()
    found = Page(text)
    # nothing is fetched: not by a tag, not by a style; and the browser is told so
    assert all(source.startswith("data:") for source in found.sources)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert not re.search(r"url\(|@import|https?://", "".join(found.styles))
    (policy,) = [str(m["content"]) for m in found.metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    # ids and what points to them
    assert [name for name, n in Counter(found.ids).items() if n > 1] == []
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert set(found.labels) <= set(found.ids)
    # every figure: one picture with words for who cannot see it, one card
    assert len(found.figures) == 5  # hessian, landscape, sharpness, slice twice
    assert all(figure == {"img": 1, "objective-card": 1, "alt": 1} for figure in found.figures)
    # data for the interactive figures and the comparison
    data = {facts["id"]: json.loads(body) for facts, body in found.scripts if facts.get("type") == "application/json"}
    assert {"data-landscape-end", "data-sharpness-end", "run-data"} <= set(data)
    assert [run["seed"] for run in data["run-data"]["runs"]] == [0, 0, 0, 1]
    assert data["run-data"]["runs"][0]["curves"]["val/accuracy"] == [[0, 1, 2], [0.3, 0.4, 0.5]]


def test_names_cannot_break_out(written: Path) -> None:
    text = written.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    bodies = [body for facts, body in Page(text).scripts if not facts.get("type")]
    assert len(bodies) == 2  # plotly and ours


def test_the_tables_and_problems_are_on_it(written: Path) -> None:
    text = written.read_text()
    assert re.search(r'<td class="failed">failed</td>', text)
    assert re.search(r'<td class="missing">missing</td>', text)
    assert "missing or failed</summary>" in text
    assert "Shown apart: objective cards differ in data" in text
    assert text.count('class="verdict ') == 11


def test_a_failed_measurement_is_not_among_what_was_measured(written: Path) -> None:
    rows = re.findall(r'<tr data-run="[^"]*-vit1">.*?</tr>', written.read_text())
    assert [re.findall(r'<td class="words">([^<]*)</td>', row)[-1] for row in rows] == ["–"]


def test_a_run_whose_process_is_gone_does_not_run(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", facts={"status": "running"})
    assert re.findall(r"<td>(stopped|running)</td>", build(tmp_path).read_text()) == ["stopped"]


def test_a_page_without_results_has_no_plotly_and_says_so(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit")
    run.journal.unlink()
    text = build(tmp_path).read_text()
    assert "No run has a result yet" in text
    assert "plotly.js" not in text
    assert len(text) < 200_000


def test_runs_are_compared_in_what_differs(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, optimizer__lr=0.1)
    make_run("vit", 1, optimizer__lr=0.2)
    found = html_page.comparison(run_index.collect(run_search.every(tmp_path / "runs")))
    assert found["keys"] == ["optimizer.lr", "seed"]
    assert [run["config"] for run in found["runs"]] == [
        {"optimizer.lr": 0.1, "seed": 0},
        {"optimizer.lr": 0.2, "seed": 1},
    ]


#: what must not happen, kept from before anything else runs
WATCH = """
<script>
window.wrong = [];
window.addEventListener("error", (event) => window.wrong.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => window.wrong.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => window.wrong.push(event.violatedDirective + event.blockedURI));
for (const level of ["error", "warn"]) console[level] = (...words) => window.wrong.push(words.join(" "));
</script>
"""

#: opens, ticks, sorts, filters and switches everything; reports in the title, where the dump shows it
CLICKS = """
<script>
window.addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  await wait(1500);
  document.getElementById("theme").click();
  const boxes = [...document.querySelectorAll("#run-table input")];
  boxes.slice(0, 2).forEach((box) => box.click());
  const select = document.getElementById("curve");
  select.value = "val/nll";
  select.dispatchEvent(new Event("change"));
  document.querySelector("#run-table thead th:nth-child(6)").click();
  const filter = document.getElementById("filter");
  filter.value = "alternet";
  filter.dispatchEvent(new Event("input"));
  window.dispatchEvent(new Event("beforeprint"));
  window.dispatchEvent(new Event("afterprint"));
  await wait(1500);
  const overflow = document.documentElement.scrollWidth > window.innerWidth;
  document.title = JSON.stringify({
    wrong: window.wrong,
    plots: document.querySelectorAll(".js-plotly-plot .main-svg").length > 0
      && [...document.querySelectorAll("details.interactive .plot")].every((plot) => plot.querySelector(".main-svg")),
    theme: document.documentElement.dataset.theme, compared: document.querySelectorAll("#compared thead th").length,
    lines: document.querySelectorAll("#curves .scatterlayer .trace").length, overflow,
    shown: [...document.querySelectorAll("#run-table tbody tr")].filter((row) => !row.hidden).length,
    sorted: document.querySelectorAll("#run-table th[aria-sort=ascending]").length,
  });
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 500)])
def test_a_click_through_it_in_chromium(written: Path, tmp_path: Path, dark: bool, width: int) -> None:
    clicked = tmp_path / "clicked.html"
    text = written.read_text().replace("<title>", WATCH + "<title>", 1)
    clicked.write_text(text.replace("</body>", CLICKS + "</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000", "--dump-dom",
        clicked.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    console = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    # what the browser says of plotly's and the software renderer's speed is no error
    assert [
        line for line in console if "Canvas2D: Multiple readback" not in line and "GL Driver Message" not in line
    ] == []
    title = re.search(r"<title>(.*?)</title>", ended.stdout)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {
        "wrong": [],
        "plots": True, "theme": "light" if dark else "dark", "compared": 3, "lines": 2, "overflow": False, "shown": 1,
        "sorted": 1,
    }  # fmt: skip
