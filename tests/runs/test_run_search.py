"""The runs of one configuration: the newest that is finished, or that can go on."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vitscope.runs import run_dir, run_lock, run_search


def cfg(tmp_path: Path, **more: object) -> DictConfig:
    return OmegaConf.create({"paths": {"runs": str(tmp_path / "runs")}, "seed": 1, "run_dir": None, **more})


def test_the_newest_run_is_the_one_made_last_whatever_its_name(tmp_path: Path) -> None:
    """Runs of jobs, of sweeps and of ``run_dir=`` come after those named by their time in the order of names."""
    runs = tmp_path / "runs"
    with run_lock.released_at_end():
        old = run_dir.create(cfg(tmp_path, run_dir=str(runs / "sweeps" / "000-a")), "train")
        new = run_dir.create(cfg(tmp_path), "train")
    old.note(created="2026-01-31T12:00:00+0000", status="stopped")
    new.note(status="stopped")
    for run in (old, new):
        run.checkpoints.mkdir()
        (run.checkpoints / "manifest.json").write_text("{}")
    identity = new.provenance()["config_hash"]
    assert run_search.unfinished(runs, identity) == new
    for run in (old, new):
        run.note(status="finished")
    assert run_search.finished(runs, identity) == new
    new.note(created="not a date")
    assert run_search.finished(runs, identity) == old


def test_a_run_from_other_weights_is_not_taken_up_as_a_training_from_initial_ones(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with run_lock.released_at_end():
        scratch, fine_tuned = run_dir.create(cfg(tmp_path), "train"), run_dir.create(cfg(tmp_path), "train")
    fine_tuned.note(started_from={"checkpoint": "pretrained.pt", "step": 0, "weights_only": True})
    for run in (scratch, fine_tuned):
        run.note(status="stopped")
        run.checkpoints.mkdir()
        (run.checkpoints / "manifest.json").write_text("{}")
    identity = scratch.provenance()["config_hash"]
    assert fine_tuned.provenance()["config_hash"] == identity
    assert run_search.unfinished(runs, identity) == scratch
    scratch.note(status="finished")
    assert run_search.unfinished(runs, identity) is None
