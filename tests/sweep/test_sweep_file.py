"""Sweep files: what is refused and why, and that every file in sweeps/ is sound."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.configs.sweep_files import GOOD, sweep_of
from vitscope.cli import exit_codes
from vitscope.cli import sweep as command
from vitscope.config import loading
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import (
    lint,
    local_runner,
    sweep_file,
    trial_process,
    wandb_agents,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
SMALL = ["profile=smoke", "caps=smoke", "logger=none", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_sound(file: Path) -> None:
    sweep = sweep_file.read(file, ["profile=smoke"])
    assert lint.problems(sweep) == []
    assert sweep.parameters["logger.group"] == {"value": file.stem}
    assert file.read_text().startswith("# ")
    if sweep.method == "grid":
        trials = sweep_file.grid(sweep)
        assert len(trials) == math.prod(len(sweep.parameters[key]["values"]) for key in sweep.swept) > 1


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_trial_composes_and_builds(file: Path) -> None:
    for profile in ("smoke", "cifar100"):
        assert lint.problems(sweep_file.read(file, [f"profile={profile}"]), thorough=True) == []


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model.n_msa": {"values": [None, "[0,1,1,2]"]}}, 'arrives as the string None; write "null" in quotes'),
        ({"model": {"values": [{"depth": 18}]}}, "is a dict"),
        ({"model": {"parameters": {"depth": {"value": 18}}}}, "nested parameters"),
        ({"model.name": {"values": ["a=b", "c"]}}, "has an = in it"),
        ({"optimizer.lr": {"values": ["1e-3", 1.0e-2]}}, "is a string in YAML; write the number with a dot, such as 1.0e-3"),
        ({"optimizer.lr": {"min": "1e-5", "max": "1e-2"}}, "parameters.optimizer.lr.min=1e-5: not a number"),
        ({"optimizer.lr": {"values": [math.inf]}}, "not a finite number"),
        ({"model.n_msa": {"value": "0,1,1,2"}}, "would start a sweep of its own"),
        ({"model": {"value": "a b: {"}}, "is no override"),
        ({"model.depht": {"values": [18, 34]}}, "model.depht=18: no declared key; did you mean depth"),
        ({"optimiser": {"value": "adamw"}}, "optimiser"),
        ({"objective": {"values": ["strongg"]}}, "objective=strongg: no such choice; did you mean strong"),
        ({"model": {"value": "vit"}, "model.patch_size": {"values": [5, 4]}}, "does not divide data.image_size=32"),
        ({"run_dir": {"value": "x"}}, "the runner sets it"),
        ({"seed": {"values": []}}, "values must be a list"),
        ({"seed": {"values": [0, 0]}}, "occurs twice"),
        ({"seed": {"value": 0, "vlaues": [1]}}, "did you mean values"),
        ({"seed": 3}, "is not a mapping; write {value: 3}"),
        ({"seed": {"distribution": "beta", "min": 0}}, "no such distribution here"),
        ({"seed": {"min": 3, "max": 1}}, "min 3 is not below max 1"),
    ],
)  # fmt: skip
def test_values_that_break_are_refused_in_one_line(parameters: dict[str, Any], message: str) -> None:
    found = lint.problems(sweep_of(parameters))
    assert len(found) == 1
    assert message in found[0]
    assert "\n" not in found[0]
    with pytest.raises(ConfigError):
        lint.check(sweep_of(parameters))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"command": ["${env}", "${interpreter}", "${program}", "${args}"]}, "command: "),
        ({"program": "other.py"}, "program: other.py"),
        ({"method": "gird"}, "method: gird is unknown"),
        ({"metric": {"name": "val/acc", "goal": "maximize"}}, "did you mean val/accuracy"),
        ({"metric": {"name": "val/accuracy"}}, "metric.goal"),
        ({"metric": None, "method": "bayes"}, "metric: missing"),
        ({"run_cap": 0}, "run_cap: 0"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type=envelope: not supported; use hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "no iteration to compare at"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "etaa": 3}}, "early_terminate.etaa"),
        ({"earlyterminate": {}}, "did you mean early_terminate"),
    ],
)
def test_the_rest_of_a_file_is_checked(content: dict[str, Any], message: str) -> None:
    found = lint.problems(sweep_of({"seed": {"values": [0, 1]}}, **content))
    assert len(found) == 1
    assert message in found[0]


def test_reading_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(GOOD)
    sweep = sweep_file.read(file, ["analysis=[]", "trainer.max_epochs=2"])
    assert sweep_file.grid(sweep)[1] == {"seed": 1, "analysis": "[]", "trainer.max_epochs": 2}
    assert sweep_file.arguments(sweep_file.grid(sweep)[1]) == ["seed=1", "analysis=[]", "trainer.max_epochs=2"]
    assert sweep.name != sweep_file.read(file).name
    with pytest.raises(ConfigError, match="the sweep varies this key"):
        sweep_file.read(file, ["seed=3"])
    file.write_text("parameters: {seed: 3}")
    with pytest.raises(ConfigError, match="parameters.seed=3: not a mapping; write {value: ...} or {values: "):
        sweep_file.read(file, ["seed=4"])
    for text, why in (("a: [", "not YAML"), ("program: x", "no parameters")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            sweep_file.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        sweep_file.read(tmp_path / "none.yaml")


def test_a_time_of_the_command_is_no_number_to_the_base_of_60(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("parameters: {seed: {values: [0, 1]}}")
    sweep = sweep_file.read(file, ["trainer.max_time=12:00:00", "optimizer.lr=0.1"])
    assert sweep.parameters["trainer.max_time"] == {"value": "12:00:00"}
    assert sweep.parameters["optimizer.lr"] == {"value": 0.1}


def test_a_sweep_of_the_package_is_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("heads", "heads.yaml", "sweeps/heads.yaml"):
        assert sweep_file.find(name) == ROOT / "sweeps" / "heads.yaml"
    own = tmp_path / "heads.yaml"
    own.write_text(GOOD)
    assert sweep_file.find("heads.yaml") == Path("heads.yaml")  # a file here comes first
    assert sweep_file.read(own).name.startswith("heads-")
    with pytest.raises(
        ConfigError, match="SWEEP=head: cannot be read .no such file.; name a file, or .* did you mean heads"
    ):
        sweep_file.find("head")
    with pytest.raises(ConfigError, match="cannot be read .no such file."):
        sweep_file.find(tmp_path / "elsewhere" / "heads.yaml")


def test_an_installed_package_has_the_sweeps_and_trains_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert included["force-include"]["sweeps"] == "vitscope/sweeps"  # beside vitscope/conf
    shutil.copytree(ROOT / "sweeps", tmp_path / "vitscope" / "sweeps")
    monkeypatch.setattr(loading, "folder", lambda: tmp_path / "vitscope" / "conf")
    monkeypatch.chdir(tmp_path)
    sweep = sweep_file.read("heads")
    assert sweep.path.is_relative_to(tmp_path)
    command = [sys.executable, "-m", "vitscope", "train"]
    assert trial_process.train_program() == command
    assert local_runner.program_command(sweep) == command
    assert wandb_agents.content(sweep)["command"] == [
        "${env}",
        "python",
        "-m",
        "vitscope",
        "train",
        "${args_no_hyphens}",
    ]
    assert "command" in sweep_file.read("heads").content
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert local_runner.program_command(sweep) == [sys.executable, str(ROOT / "train.py")]  # a checkout, from elsewhere
    monkeypatch.chdir(ROOT)
    assert local_runner.program_command(sweep) == [sys.executable, "train.py"]
    assert wandb_agents.content(sweep)["command"] == list(sweep_file.COMMAND)


def test_a_dry_sweep_lists_its_trials_and_runs_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VITSCOPE_RUNS", str(tmp_path))
    assert command.command([str(ROOT / "sweeps" / "models.yaml"), "dry=1", "limit=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trial 0  seed=0 model=")
    assert lines[2:] == ["2 trials", "nothing was run (dry)"]
    assert not list(tmp_path.iterdir())
    assert exit_codes.run_command(lambda: command.command([str(ROOT / "sweeps" / "models.yaml"), "dry=maybe"])) == 2


def test_the_command_refuses_and_points(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def code(*argv: str) -> int:
        return exit_codes.run_command(lambda: sys.exit(command.command(argv)))

    monkeypatch.chdir(ROOT)
    assert code("--help") == 0
    for argv, message in (
        (["jobs=2"], "error: SWEEP: no sweep file named"),
        (["sweeps/models.yaml", "jobs=two"], "error: JOBS=two: not a whole number"),
        (["sweeps/models.yaml", "jobs=1", "model.dpth=3"], "did you mean depth"),
        (["sweeps/models.yaml", "gpus=99"], "error: GPUS=99: this machine has"),
        (["sweeps/models.yaml", "server=maybe"], "error: server=maybe: neither true nor false"),
        (
            ["sweeps/models.yaml", "sweep_id=a1b2c3"],
            "error: sweep_id=a1b2c3: a sweep of this machine has no id; add server=true",
        ),
    ):
        assert code(*argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow  # test_wandb_agents.py trains in a trial, and test_local_runner.py runs sweeps of a small program
def test_a_trial_of_the_real_train(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(GOOD)
    small = [
        "model=vit",
        "model.depth=1",
        "model.patch_size=8",
        "analysis=[]",
        "test=false",
        "data=digits",
        "limit=1",
        *SMALL,
    ]
    env = {**os.environ, "VITSCOPE_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    begin = [sys.executable, "-m", "vitscope", "sweep", str(file), "jobs=1", *small]
    done = subprocess.run(begin, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    (run,) = (tmp_path / "runs" / "sweeps").glob("x-*/000-*")
    assert trial_process.outcome(run).finished
    assert "trial 0 (seed=0): finished, cpu0, val/accuracy" in done.stdout
    assert "1 finished" in done.stdout
