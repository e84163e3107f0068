"""A result reaches its files, the metrics log and the figure as a whole, whatever stops it in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import vitscope as vs
from tests.fixtures.programs.kills import KILLED, at_every_change
from vitscope.analyses import outputs, runner
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis
from vitscope.runs import metrics_log, result_store
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write

torch.set_num_threads(1)
ANALYSIS = Analysis("variance", vs.feature_map_variance, {}, {})


pytestmark = pytest.mark.usefixtures("small_figures")


def measured() -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    probe = vs.Probe(network, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))], vs.Objective())
    return vs.feature_map_variance(probe)


def place(folder: Path) -> AnalysisContext:
    return AnalysisContext(OmegaConf.create({}), Run(folder), nn.Identity(), None, "end", 0, 7)


def state(folder: Path) -> tuple[list[str], list[dict], dict]:
    """Return the names of files, the rows without their time, and the readable copy."""
    rows = [{k: v for k, v in row.items() if k != "time"} for row in metrics_log.read(folder / "metrics.jsonl")]
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return files, rows, json.loads((folder / "results" / "variance" / "end-0.json").read_text())


def stored(folder: Path, result: Any) -> None:
    outputs.store(ANALYSIS, place(folder), folder / "results" / "variance", "end-0", result)


def again(folder: Path, result: Any) -> None:
    """Ask for the result as the next `analyze` does: take it from the disk where it is there."""
    inside = folder / "results" / "variance"
    for name in (folder, inside, folder / "figures"):
        atomic_write.sweep(name)
    if (inside / "end-0.npz").exists():
        outputs.complete(ANALYSIS, place(folder), inside, "end-0", result_store.load(inside / "end-0.npz"))
    else:
        stored(folder, result)


@pytest.mark.parametrize("full_disk", [False, True])
def test_a_result_is_stopped_at_every_write(tmp_path: Path, full_disk: bool) -> None:
    """A kill or a full disk at each change of the folder; asked for again, everything is as without the stop."""
    result = measured()
    stored(tmp_path / "whole", result)
    expected = state(tmp_path / "whole")
    assert len(expected[1]) == 1

    def prepared(n: int) -> Path:
        (tmp_path / str(n)).mkdir()
        return tmp_path / str(n)

    stops = 0
    for folder, code in at_every_change(prepared, lambda folder: stored(folder, result), full_disk=full_disk):
        assert code == (6 if full_disk else KILLED)
        again(folder, result)
        assert state(folder) == expected, folder.name
        stops += 1
    assert stops > 10


@pytest.mark.parametrize(
    "lost", ["metrics.jsonl", "results/variance/end-0.json", "figures/variance-end.png", "figures/variance-end.csv"]
)
def test_a_result_of_an_earlier_version_that_is_not_whole(tmp_path: Path, lost: str) -> None:
    """Without a mark too, what is missing beside the arrays is made when the result is asked for."""
    result = measured()
    stored(tmp_path, result)
    expected = state(tmp_path)
    (tmp_path / lost).unlink()
    again(tmp_path, result)
    assert state(tmp_path) == expected
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again(tmp_path, result)  # whole: nothing is written
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_earlier_result_is_completed_where_it_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured()
    monkeypatch.setattr(runner, "_stem", lambda *_: "end-0")
    monkeypatch.setattr(runner.checkpoint_weights, "weights_hash", lambda _: result.card.checkpoint)
    monkeypatch.setattr(runner, "_earlier", lambda *_: result)
    result_store.save(tmp_path / "results" / "variance", "end-0", result)
    assert runner.perform(ANALYSIS, place(tmp_path)) is result
    assert [row["tag"] for row in metrics_log.read(tmp_path / "metrics.jsonl")] == ["end"]
    assert (tmp_path / "figures" / "variance-end.pdf").is_file()
