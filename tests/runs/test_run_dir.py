"""Run folders are made exclusively, found again, and hold no secrets."""

from __future__ import annotations

import logging
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vitscope.runs import run_dir, run_end, run_lock, run_search
from vitscope.runtime.errors import CheckpointError, ConfigError
from vitscope.runtime.logging import command_logging


def cfg(tmp_path: Path, **more: object) -> DictConfig:
    return OmegaConf.create({"paths": {"runs": str(tmp_path / "runs")}, "seed": 1, "run_dir": None, **more})


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: run_dir.create(cfg(tmp_path), "train"), range(16)))
    assert len({run.path for run in made}) == 16
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run.id) for run in made)
    assert [run.id for run in run_search.every(tmp_path / "runs")] == sorted(run.id for run in made)


def test_a_name_stands_in_the_id(tmp_path: Path) -> None:
    run = run_dir.create(cfg(tmp_path, name="vit_baseline-2", tags=["a"]), "train")
    assert re.fullmatch(r"\d{8}-\d{6}-vit_baseline-2-[0-9a-f]{6}", run.id)
    assert run.config().tags == ["a"]


def test_a_folder_is_not_used_twice(tmp_path: Path) -> None:
    with run_lock.released_at_end():
        run_dir.create(cfg(tmp_path, run_dir=str(tmp_path / "a")), "train")
    with pytest.raises(ConfigError, match="already holds a run"):
        run_dir.create(cfg(tmp_path, run_dir=str(tmp_path / "a")), "train")


def test_the_provenance_names_the_device(tmp_path: Path) -> None:
    run = run_dir.create(cfg(tmp_path, trainer={"accelerator": "cpu"}), "train")
    assert run.provenance()["device"] == "cpu"


def test_the_log_holds_what_a_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_dir.create(cfg(tmp_path), "train")
    try:
        run_end.log_tracebacks_to(run)
        assert run.log.read_text() == ""
        with command_logging():
            logging.getLogger("vitscope").info("objective: cross entropy")
            logging.getLogger("vitscope").warning("damaged")
            with warnings.catch_warnings():  # of pytest's own, which records every warning
                warnings.resetwarnings()
                warnings.showwarning = lambda *given, **_: print(warnings.formatwarning(*given[:4]), end="")
                warnings.warn("null for the intervals", stacklevel=1)
    finally:
        run_end.log_tracebacks_to(None)
    with command_logging():
        logging.getLogger("vitscope").info("of no run")
    assert run.log.read_text() == "objective: cross entropy\nwarning: damaged\nwarning: null for the intervals\n"


def test_secrets_stay_out(tmp_path: Path) -> None:
    secret = cfg(tmp_path, logger={"api_key": "abc123", "nested": [{"token": "abc123"}]}, tokens=4)
    run = run_dir.create(secret, "train")
    text = (run.path / "config.yaml").read_text()
    assert "abc123" not in text
    assert run.config().tokens == 4


def test_finding(tmp_path: Path) -> None:
    run = run_dir.create(cfg(tmp_path), "train")
    file = run.checkpoints / "last.ckpt"
    file.parent.mkdir()
    file.write_bytes(b"")
    assert run_dir.find(run.path) == run_dir.find(file) == run
    with pytest.raises(CheckpointError, match="no run there"):
        run_dir.find(tmp_path)
    run.note(status="finished")
    assert run.provenance()["status"] == "finished"
    assert run.provenance()["command"] == "train"


def test_names_from_jobs_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../../etc/pass wd")
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = run_dir.requested_run_folder(cfg(tmp_path))
    assert path.parent == tmp_path / "runs"
    assert "/" not in path.name


def test_commands_of_one_job_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script may start several trainings, and torchrun calls all its jobs ``none`` on one port."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with run_lock.released_at_end():
        first = run_dir.create(cfg(tmp_path), "train")
    first.note(status="failed")
    with run_lock.released_at_end():
        assert run_dir.create(cfg(tmp_path), "train") == first  # the job starts the same command again
    first.note(status="finished")
    before = {file.name: file.read_bytes() for file in first.path.iterdir()}
    with run_lock.released_at_end():
        second = run_dir.create(cfg(tmp_path, seed=2), "train")
        assert run_dir.requested_run_folder(cfg(tmp_path, seed=2)) == second.path  # of the other ranks
    assert {file.name: file.read_bytes() for file in first.path.iterdir()} == before
    with run_lock.released_at_end():
        third = run_dir.create(cfg(tmp_path), "train")
    assert [run.id for run in (first, second, third)] == [f"torchrun-none-29500{end}" for end in ("", "-2", "-3")]
    with pytest.raises(ConfigError, match="already holds a run"), run_lock.released_at_end():
        run_dir.create(cfg(tmp_path, run_dir=str(first.path), seed=3), "train")


def test_a_run_is_made_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with run_lock.released_at_end():
        run = run_dir.create(cfg(tmp_path), "train")
    assert run.provenance()["git_commit"] is None
