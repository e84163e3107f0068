"""``vitscope wandb-report``: the report's and the workspace's specification, and what a server gets of it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from tests.fixtures.programs.wandb_server import ENTITY, PROJECT, Server
from tests.fixtures.runs.report_runs import rise, spectrum, write_run
from vitscope.cli.online import wandb_report as cli
from vitscope.runtime.errors import ConfigError, DataError

needs_package = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs the extra report")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the runs of a sweep over learning rates and models, and figures."""
    monkeypatch.chdir(tmp_path)
    for i, (model, lr) in enumerate([("alternet", 1e-3), ("alternet", 1e-2), ("convnet", 1e-3)]):
        page = f"https://wandb.ai/{ENTITY}/{PROJECT}/runs/id{i}"
        facts = {"wandb_id": f"id{i}", "wandb_url": page}
        measured = {"hessian": spectrum(0.1, 100.0), "sharpness": rise(0.1)}
        write_run(tmp_path / "runs", model, 0, optimizer__lr=lr, facts=facts, measured=measured)
    write_run(tmp_path / "runs", "vit", 0)  # was never logged to W&B
    (tmp_path / "figures" / "tables").mkdir(parents=True)
    for name in ("hessian-newest", "tables/effects"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "figures" / f"{name}.png")
    return tmp_path


@needs_package
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_specification_shows_exactly_the_runs_and_what_they_differ_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", secret := "5ecret0" * 6)
    assert cli.command(["spec=report.json", f"title=rates {secret}"]) == 0
    text = Path("report.json").read_text()
    assert secret not in text
    content = json.loads(text)
    report, workspace = content["report"]["spec"], content["workspace"]["spec"]
    grids = [block["metadata"] for block in report["blocks"] if block["type"] == "panel-grid"]
    headings = [block["children"][0]["text"] for block in report["blocks"] if block["type"] == "heading"]
    assert headings == ["Settings and outcomes", "Metrics over steps", "Claims of the paper", "Figures"]
    for grid in grids[:2]:
        (runset,) = grid["runSets"]
        assert [(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]] == [
            ("name", "IN", ["id0", "id1", "id2"])
        ]
        assert runset["grouping"] == [{"section": "config", "name": "model._target_.value"}]
    (coordinates,) = grids[0]["panelBankSectionConfig"]["panels"]
    axes = [column["accessor"] for column in coordinates["config"]["columns"]]
    assert {"config:optimizer.lr.value", "config:model._target_.value", "summary:test/accuracy"} <= set(axes)
    assert not any("seed" in axis or "image_size" in axis for axis in axes)  # equal in all runs
    curves = [panel["config"] for panel in grids[1]["panelBankSectionConfig"]["panels"]]
    assert [curve["metrics"] for curve in curves] == [["train/loss"], ["val/nll"], ["val/accuracy"]]
    assert {(c["xAxis"], c["groupBy"], c["groupAgg"], c["groupArea"]) for c in curves} == {
        ("trainer/global_step", "model._target_.value", "mean", "minmax")
    }
    (table,) = [block["content"] for block in report["blocks"] if block["type"] == "markdown-block"]
    assert "MSA flattens the loss landscape" in table
    assert "inconclusive" in table
    media = [panel["config"]["mediaKeys"] for panel in grids[2]["panelBankSectionConfig"]["panels"]]
    assert media == [["figures/hessian-newest"], ["figures/tables/effects"]]
    sections = workspace["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Settings and outcomes", "Metrics over steps", "Figures"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Start the stand-in; W&B's client in this process talks to it."""
    wandb.teardown()
    started = Server()
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    for name, value in {**started.environment, "HOME": str(tmp_path), "WANDB_FINISH_TIMEOUT": "10"}.items():
        monkeypatch.setenv(name, value)
    yield started
    started.shutdown()
    started.server_close()
    thread.join()
    wandb.teardown()


@needs_package
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:wandb.*", "ignore::ResourceWarning")
def test_a_server_gets_the_figures_the_report_and_the_workspace(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.command(["title=rates"]) == 0
    (run,) = server.runs.values()
    assert (run.job_type, run.exit_code) == ("report", 0)
    logged = {key for row in run.history for key in row}
    assert {"figures/hessian-newest", "figures/tables/effects"} <= logged
    report, workspace = server.views
    assert (report["type"], report["displayName"], report["entityName"]) == ("runs", "rates", ENTITY)
    assert (workspace["type"], workspace["displayName"], workspace["projectName"]) == ("project-view", "rates", PROJECT)
    grids = [block["metadata"] for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert [f["value"] for f in grids[2]["runSets"][0]["filters"]["filters"]] == [[run.name]]
    out = capsys.readouterr().out
    assert f"{server.url}/{ENTITY}/{PROJECT}/reports/rates--" in out
    assert "workspace: " in out


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["run=x"], ConfigError, "run=x: no such option; did you mean runs"),
        (["runs=nowhere"], DataError, "no run there was logged to W&B; train with logger=wandb"),
        (
            [],
            ConfigError,
            "a report is made on the server, and no key is configured; run wandb login, or .*spec=report.json",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], error: type[Exception], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscope.reports.online import wandb_report

    monkeypatch.setattr(wandb_report, "check_package", lambda: None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(folder / "none"))
    with pytest.raises(error, match=text):
        cli.command(words)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"wandb-workspaces .*pip install 'vitscope\[report\]'"):
        cli.command([])


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{option}=" in printed for option in cli.OPTIONS)
