"""``train.py -m``: every job a process of its own, failures named, what cannot be right refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from vitscope.config import loading
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, DistributedError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import hydra_multirun, trial_process
from vitscope.training import stop_callbacks

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parents[1] / "fixtures" / "programs" / "sweep_program.py"


@pytest.fixture
def hydra_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that Hydra runs a job of a multirun here; the trivial program stands in for ``train.py``."""
    folder = tmp_path / "multirun" / "0"
    folder.mkdir(parents=True)
    monkeypatch.setattr(trial_process, "train_program", lambda: [sys.executable, str(PROGRAM)])
    monkeypatch.setattr(hydra_multirun, "_folder", folder.parent)
    return folder


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, **launcher: Any) -> None:
    hydra = {
        "runtime": {"output_dir": str(folder)},
        "sweep": {"dir": str(folder.parent)},
        "overrides": {"task": list(overrides)},
        "launcher": {"_target_": "x.BasicLauncher", **launcher},
    }
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create(hydra)))


@pytest.mark.parametrize(
    ("rates", "n"),
    [("-2,-1", 0), pytest.param("1e-3,-1", 1, marks=pytest.mark.slow)],  # a training takes 20 s
)
def test_a_multirun_of_two_jobs(tmp_path: Path, rates: str, n: int) -> None:
    small = ["model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "analysis=[]", "test=false", "caps=smoke",
             "logger=none", "trainer.accelerator=cpu", f"paths.runs={tmp_path / 'runs'}"]  # fmt: skip
    command = [sys.executable, "train.py", "-m", *small, f"optimizer.lr={rates}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-1000:]
    (folder,) = (tmp_path / "runs").glob("multirun-*")
    assert trial_process.outcome(folder / "0").finished == (n == 1)
    assert "error: optimizer.lr=-1: not greater than 0" in done.stderr
    assert f"failed: job 1 (optimizer.lr=-1): exit 2; {folder}/1" in done.stderr
    assert f"{n} of 2 jobs finished" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("command_messages")
def test_folders_of_jobs_may_have_names(hydra_job: Path, capsys: Any) -> None:
    """``hydra.sweep.subdir`` names them, also with a folder above each."""
    for name, code in (("10", 0), ("2", 3), ("vit/seed-0", 0)):
        (hydra_job.parent / name).mkdir(parents=True)
        facts = {"overrides": [f"name={name}"], "exit_code": code}
        (hydra_job.parent / name / hydra_multirun.JOB).write_text(json.dumps(facts))
    assert hydra_multirun._log_failed_jobs() == 3
    shown = capsys.readouterr()
    assert "2 of 3 jobs finished" in shown.out
    assert "failed: job 2 (name=2): exit 3" in shown.err


@pytest.mark.usefixtures("command_messages")
def test_a_job_returns_its_metric_and_goes_on(hydra_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pretend(monkeypatch, hydra_job, "do=fail", "accuracy=0.7")
    assert hydra_multirun.job("val/accuracy") is None
    assert json.loads((hydra_job / "job.json").read_text()) == {
        "overrides": ["do=fail", "accuracy=0.7"],
        "exit_code": 3,
    }
    assert hydra_multirun._log_failed_jobs() == 3
    assert "failed: job 0 (do=fail accuracy=0.7): exit 3" in capsys.readouterr().err
    # a queue that starts it again (preempted, out of time) finds it begun
    assert hydra_multirun.job("val/accuracy") == 0.7
    assert json.loads((hydra_job / "job.json").read_text())["exit_code"] == 0


def test_a_job_that_says_0_without_a_result_failed(hydra_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hydra_job, "do=lie")
    assert hydra_multirun.job("val/accuracy") is None
    assert json.loads((hydra_job / "job.json").read_text())["exit_code"] == 1


def test_jobs_side_by_side_share_the_cores(hydra_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "1")
    pretend(monkeypatch, hydra_job, "do=finish", _target_="x.JoblibLauncher", n_jobs=4)
    assert hydra_multirun.job("val/accuracy") == 0.5
    (seen,) = [json.loads(line) for line in (hydra_job / "starts.txt").read_text().splitlines()]
    assert (seen["OMP_NUM_THREADS"], seen["RANK"]) == ("2", None)
    assert (hydra_job / "output.txt").exists()


def test_a_stop_reaches_the_job_and_no_other_starts(hydra_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hydra_job, "do=wait")
    ready = hydra_job / "ready"
    monkeypatch.setattr(stop_flag, "requested", lambda: 15 if ready.exists() else None)
    with pytest.raises(Interrupted):
        hydra_multirun.job("val/accuracy")
    assert trial_process.outcome(hydra_job).exit_code == 143
    monkeypatch.undo()
    stop_flag.request(15)
    with pytest.raises(Interrupted):
        hydra_multirun.job("val/accuracy")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run=runs/x"], "run=runs/x: all jobs of a multirun would share it"),
        (["run_dir=x"], "run_dir=x: all jobs of a multirun would share it"),
        (
            ["hydra/launcher=joblib"],
            r"hydra/launcher=joblib: its plugin is not installed; pip install 'vitscope\[joblib\]'",
        ),
        (["hydra/sweeper=bayes"], r"pip install 'vitscope\[hydra-optuna\]'"),
        (["hydra/launcher=local"], r"pip install 'vitscope\[submitit\]'"),
        (["hydra.launcher.nodes=2"], "leave it 1 and set trainer.devices"),
    ],
)
def test_what_cannot_be_right_is_refused(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_multirun, "_installed", lambda package: False)
    with pytest.raises(ConfigError, match=message):
        hydra_multirun.check(["-m", *argv, "seed=0,1"])


def test_slurm_and_torchrun_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_multirun, "_installed", lambda package: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no SLURM here"):
        hydra_multirun.check(["-m", "hydra/launcher=slurm"])
    with pytest.raises(ConfigError, match="would minimize the accuracy; use hydra/sweeper=bayes"):
        hydra_multirun.check(["-m", "hydra/sweeper=optuna"])
    hydra_multirun.check(["-m", "hydra/launcher=local", "hydra/sweeper=bayes"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="every rank of torchrun would run every job"):
        hydra_multirun.check(["-m", "seed=0,1"])


@pytest.mark.parametrize(
    "choice",
    ["launcher=basic", "launcher=parallel", "launcher=local", "launcher=slurm", "sweeper=bayes"],
)
def test_every_launcher_and_sweeper_composes(choice: str) -> None:
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        cfg = compose("train", overrides=[f"hydra/{choice}"], return_hydra_config=True)
    node = OmegaConf.to_container(cfg.hydra[choice.partition("=")[0]], resolve=False)
    target = cast(dict[str, Any], node)["_target_"]
    assert target.endswith({"launcher": "Launcher", "sweeper": "Sweeper"}[choice.partition("=")[0]])
    assert cfg.hydra.callbacks.jobs._target_ == "vitscope.sweep.hydra_multirun.Folder"
    assert "${hydra.job.num}" in str(OmegaConf.to_container(cfg.hydra.sweep, resolve=False))


def test_ranks_that_composed_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check = stop_callbacks.ConfigurationCheck("aa")
    check.setup(cast(Any, None), cast(Any, None), "fit")
    monkeypatch.setattr(stop_callbacks, "gather_objects", lambda value: ["aa", "aa", "bb"])
    with pytest.raises(DistributedError, match="rank 2 composed another configuration than rank 0"):
        check.setup(cast(Any, None), cast(Any, None), "fit")


def test_ranks_that_resume_at_different_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check, trainer = stop_callbacks.ConfigurationCheck("aa"), cast(Any, SimpleNamespace(global_step=6))
    check.on_train_start(trainer, cast(Any, None))
    monkeypatch.setattr(stop_callbacks, "gather_objects", lambda step: [step, 3])
    with pytest.raises(DistributedError, match="rank 1 resumes after step 3 and rank 0 after step 6"):
        check.on_train_start(trainer, cast(Any, None))
