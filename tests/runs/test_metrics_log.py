"""The metrics log: its last values."""

from __future__ import annotations

import math
from pathlib import Path

from vitscope.runs import metrics_log


def test_a_metric_whose_last_value_is_not_finite_has_no_last_value(tmp_path: Path) -> None:
    journal = metrics_log.Journal(tmp_path / "metrics.jsonl")
    journal.append(0, 0, {"val/loss": 1.0, "val/accuracy": 0.5})
    journal.append(1, 1, {"val/loss": math.nan, "val/accuracy": 0.25})
    journal.append(2, None, {"lr": 0.1})
    journal.close()
    values = metrics_log.last_values(tmp_path / "metrics.jsonl")
    assert {key: value for key, value in values.items() if key != "time"} == {
        "step": 2, "epoch": 1, "val/accuracy": 0.25, "lr": 0.1,
    }  # fmt: skip


def test_of_steps_that_a_resumed_run_writes_again_the_table_has_the_later_values(tmp_path: Path) -> None:
    journal = metrics_log.Journal(tmp_path / "metrics.jsonl")
    for step, loss in ((0, 4.0), (1, 3.0), (2, 2.0), (1, 3.5), (2, 2.5)):  # stopped after step 0's checkpoint
        journal.append(step, 0, {"train/loss": loss})
    journal.append(2, 0, {"val/loss": 1.0})
    journal.close()
    table = metrics_log.series(tmp_path / "metrics.jsonl")
    assert table["train/loss"].to_dict() == {0: 4.0, 1: 3.5, 2: 2.5}
    assert table["val/loss"][2] == 1.0
