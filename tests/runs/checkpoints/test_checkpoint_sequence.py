"""The order and the names of a run's checkpoints, without reading them."""

from __future__ import annotations

from pathlib import Path

from vitscope.runs.checkpoints import checkpoint_manifest, checkpoint_sequence
from vitscope.runs.run_dir import Run


def test_checkpoints_are_in_the_order_of_their_steps_and_each_step_is_there_once(tmp_path: Path) -> None:
    steps = {"last.ckpt": 300, "epoch-0002.ckpt": 300, "best.ckpt": 250, "epoch-0001.ckpt": 200, "init.ckpt": 0}
    entries = {
        name: {"sha256": "0", "bytes": 1, "epoch": step // 100, "global_step": step} for name, step in steps.items()
    }
    (tmp_path / "checkpoints").mkdir()
    checkpoint_manifest.write_manifest(tmp_path / "checkpoints", entries)
    assert checkpoint_sequence.of_run(Run(tmp_path)).labels == ["init", "epoch-0001", "epoch-0002"]
    entries["last.ckpt"]["global_step"] = 301
    checkpoint_manifest.write_manifest(tmp_path / "checkpoints", entries)
    assert checkpoint_sequence.of_run(Run(tmp_path)).labels == ["init", "epoch-0001", "epoch-0002", "last"]
