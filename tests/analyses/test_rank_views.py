"""Ranks on several machines may see a file at different times; they begin with the same rows, results and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

import vitscope as vs
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.analyses import arguments, previous_result, runner
from vitscope.runs.checkpoints import checkpoint_sequence
from vitscope.runs.partial_results import PartialRows


@dataclass
class Series:
    steps: np.ndarray
    vectors: np.ndarray


def analysis(name: str, measure: Any) -> Any:
    return SimpleNamespace(name=name, measure=measure, options={}, probe={})


def views(folder: Path) -> dict[str, Any]:
    """Return what each rank works with where rank 0 sees a file that rank 1 does not see yet."""
    is_first = dist.get_rank() == 0
    own_folder = folder / f"rank-{dist.get_rank()}"
    if is_first:
        PartialRows(own_folder)["row"] = {"value": 3.0}
    rows = PartialRows(own_folder)
    rows.share()

    series = Series(np.arange(2), np.ones((3, 2))) if is_first else Series(np.arange(1), np.ones((0, 0)))
    previous_result.previous = lambda *_: series  # in a process of its own
    files = {name: folder / name for name in (("init", "last") if is_first else ("init",))}
    checkpoint_sequence.of_run = lambda _: checkpoint_sequence.Snapshots(files)
    first = analysis("variance", vs.feature_map_variance)
    due = [first, analysis("fourier", vs.relative_log_amplitude), analysis("cka", vs.cka)]
    place: Any = SimpleNamespace(run=SimpleNamespace(results=folder), due=due, alone=set(), datamodule=None)
    runner.probe_request = lambda *_: {}
    runner._stem = lambda analysis, _: analysis.name
    runner._earlier = lambda path, _: object() if is_first and path.stem == "cka" else None
    seen: Any = arguments._previous(first, place, "settings")
    return {
        "rows": dict(rows),
        "steps": seen.steps.tolist(),
        "checkpoints": arguments._checkpoints(place).labels,
        "sharing": [other.name for other in runner._sharing(first, place, "weights", True)],
    }


def test_ranks_that_see_other_files_begin_with_the_same(tmp_path: Path) -> None:
    first, second = results_of_ranks(lambda: views(tmp_path), tmp_path)
    expected = {
        "rows": {"row": {"value": 3.0}},
        "steps": [0, 1],
        "checkpoints": ["init", "last"],
        "sharing": ["fourier"],
    }
    assert first == second == expected
