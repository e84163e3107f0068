"""The edge of stability during a training: one series, also after a stop and a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vitscope as vs
from tests.fixtures.programs.stopped_measurements import stopping_at_measurement
from tests.fixtures.runs.run_folders import losses

WATCHED = ["analysis=[edge_of_stability]", "analysis.edge_of_stability.probe.n_images=8",
           "analysis.edge_of_stability.when.every_n_steps=2", "analysis.edge_of_stability.warm_start=true",
           "analysis.edge_of_stability.max_products=12",
           "trainer.max_epochs=3", "trainer.limit_train_batches=2", "test=false"]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_has_the_same_series(call, tiny, tmp_path, monkeypatch) -> None:
    assert call("train", *tiny, *WATCHED, f"run_dir={tmp_path}/whole") == 0
    # step 4: the eigenvectors of step 2 are read from the disk on the resume
    with stopping_at_measurement(3, monkeypatch):
        assert call("train", *tiny, *WATCHED, f"run_dir={tmp_path}/cut") == 143
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    whole, cut = (vs.load_results(tmp_path / name)["edge_of_stability"] for name in ("whole", "cut"))
    assert list(whole) == list(cut)
    assert set(whole) == {"init", "step-000002", "step-000004", "step-000006", "end"}
    assert whole["end"].steps.tolist() == [0, 2, 4, 6]  # the end is the last step, measured once
    for tag, result in whole.items():
        assert result == cut[tag]
    assert np.isfinite(whole["end"].overlap[1:]).all()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    folder = Path(tmp_path / "whole" / "results" / "edge_of_stability")
    assert [path.name[:13] for path in folder.glob(".vectors-*")] == [".vectors-end-"]
    assert all(path.stat().st_size < 20_000 for path in folder.glob("*.npz"))  # without vectors of the network's size
