"""Sweep files: what is refused and why, what trials a file means, and that every file in sweeps/ is sound."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vitscope.cli import exit_codes
from vitscope.cli import sweep as command
from vitscope.config import loading
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import (
    distributions,
    early_termination,
    lint,
    local_runner,
    search_algorithms,
    sweep_file,
    trial_process,
    wandb_agents,
)
from vitscope.sweep.sweep_file import Sweep

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
SMALL = ["profile=smoke", "caps=smoke", "logger=none", "trainer.accelerator=cpu"]

GOOD = """
program: train.py
method: grid
metric: {name: val/accuracy, goal: maximize}
parameters:
  seed: {values: [0, 1]}
command: ["${env}", python, "${program}", "${args_no_hyphens}"]
"""


def sweep_of(parameters: dict[str, Any], **content: Any) -> Sweep:
    return Sweep(Path("x.yaml"), {**yaml.safe_load(GOOD), "parameters": parameters, **content})


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
    for text, why in (("a: [", "not YAML"), ("program: x", "no parameters")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            sweep_file.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        sweep_file.read(tmp_path / "none.yaml")


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


def test_a_grid_varies_its_last_key_fastest() -> None:
    trials = sweep_file.grid(
        sweep_of({"model": {"values": ["vit", "convnet"]}, "seed": {"min": 0, "max": 1}, "test": {"value": False}})
    )
    assert [(t["model"], t["seed"], t["test"]) for t in trials] == [
        ("vit", 0, False), ("vit", 1, False), ("convnet", 0, False), ("convnet", 1, False),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a grid needs a list"):
        sweep_file.grid(sweep_of({"optimizer.lr": {"min": 0.1, "max": 0.2}}))


def test_random_trials_are_the_same_again_and_follow_their_distributions() -> None:
    nodes = {
        "a": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0},
        "b": {"min": 1, "max": 6},
        "c": {"values": ["x", "y"], "probabilities": [0.25, 0.75]},
        "d": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
        "e": {"distribution": "log_uniform", "min": -2.0, "max": 0.0},
        "f": {"distribution": "normal", "mu": 3.0, "sigma": 2.0},
    }
    sweep = sweep_of(nodes, method="random", run_cap=4000)
    drawn = sweep_file.planned(sweep)
    assert drawn[:10] == sweep_file.planned(sweep, 10)
    n = len(drawn)
    # means of the exact laws, within four standard errors
    for values, mean, deviation in (
        ([math.log10(t["a"]) for t in drawn], -2.0, 4 / math.sqrt(12)),
        ([t["b"] for t in drawn], 3.5, math.sqrt(35 / 12)),
        ([t["c"] == "y" for t in drawn], 0.75, math.sqrt(3) / 4),
        ([math.log(t["e"]) for t in drawn], -1.0, 2 / math.sqrt(12)),
        ([t["f"] for t in drawn], 3.0, 2.0),
    ):
        assert abs(sum(values) / n - mean) < 4 * deviation / math.sqrt(n)
    assert {t["d"] for t in drawn} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {t["b"] for t in drawn} == {1, 2, 3, 4, 5, 6}
    with pytest.raises(ConfigError, match="has no end without it"):
        sweep_file.planned(sweep_of(nodes, method="random"))


def test_hyperband_rungs_and_verdicts() -> None:
    assert early_termination.rungs({"type": "hyperband", "min_iter": 3})[:3] == [3, 9, 27]
    assert early_termination.rungs({"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3}) == [3, 9]
    rungs = [2, 4]
    good, bad = [0.1, 0.5, 0.6, 0.7], [0.1, 0.2, 0.3]
    assert early_termination.hopeless([0.1], [good], rungs, 3, True) is None  # no rung reached
    assert early_termination.hopeless(bad, [], rungs, 3, True) is None  # the first to arrive
    assert early_termination.hopeless(bad, [good], rungs, 3, True) == 2  # its best of the first two counts: 0.2 < 0.5
    assert early_termination.hopeless(good, [bad], rungs, 3, True) is None
    assert (
        early_termination.hopeless(bad, [good], rungs, 3, False) is None
    )  # a loss: smaller is better, best 0.1 equals 0.1
    assert early_termination.hopeless([9.0, 8.0], [[1.0, 2.0]], rungs, 3, False) == 2
    four = [[0.1, v] for v in (0.2, 0.3, 0.4, 0.5)]
    kept = [early_termination.hopeless(own, [o for o in four if o is not own], rungs, 2, True) for own in four]
    assert kept == [2, 2, None, None]  # the best half of four


def test_bayes_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of({"optimizer.lr": {"min": 0.1, "max": 1.0}}, method="bayes", run_cap=3)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="needs optuna, which is not installed; pip install optuna"):
        search_algorithms.start(sweep, None, {})


def test_bayes_refuses_the_optuna_of_hydras_sweeper(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of({"optimizer.lr": {"min": 0.1, "max": 1.0}}, method="bayes", run_cap=3)
    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(__version__="2.10.1"))
    with pytest.raises(ConfigError, match=r"needs Optuna >= 4, received 2.10.1 .*; pip install 'vitscope\[optuna\]'"):
        search_algorithms.start(sweep, None, {})


def test_bayes_learns_and_repeats_what_was_asked() -> None:
    pytest.importorskip("optuna")
    nodes = {"optimizer.lr": {"min": 0.0, "max": 1.0}, "seed": {"value": 3}}
    sweep = sweep_of(nodes, method="bayes", run_cap=30)
    first = search_algorithms.start(sweep, None, {})
    asked: dict[int, dict[str, Any]] = {}
    for index in range(30):
        params = first.ask(index)
        assert params is not None
        asked[index] = params
        first.tell(index, params, -((params["optimizer.lr"] - 0.7) ** 2))
    assert first.ask(30) is None
    late = [asked[index]["optimizer.lr"] for index in range(20, 30)]
    assert sum(abs(value - 0.7) for value in late) / 10 < 0.25  # uniform draws: 0.29 on average
    again = search_algorithms.start(sweep, None, {0: asked[0], 1: asked[1]})
    assert [again.ask(0), again.ask(1)] == [asked[0], asked[1]]


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
    ):
        assert code(*argv) == 2
        assert message in capsys.readouterr().err


def test_distributions_name_what_they_need() -> None:
    with pytest.raises(ConfigError, match="normal needs sigma"):
        distributions.distribution("a", {"distribution": "normal", "mu": 0})
    assert distributions.distribution("a", {"min": 0, "max": 1}) == "int_uniform"
    assert distributions.distribution("a", {"min": 0.0, "max": 1}) == "uniform"


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


@pytest.mark.parametrize("method", ["grid", "random"])
@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            {"values": ["x", "y"], "probabilities": [0.5, 0.6]},
            r"probabilities=\[0.5, 0.6\]: they sum to 1.1, expected 1; give",
        ),
        (
            {"values": ["x", "y"], "probabilities": [0.5]},
            r"expected 2 numbers, one for each value; .* such as \[0.5, 0.5\]",
        ),
        ({"values": ["x", "y"], "probabilities": [1.5, -0.5]}, "expected numbers of at least 0"),
        ({"values": ["x", "y"], "probabilities": ["a", 1]}, "expected numbers of at least 0"),
        ({"values": ["x", "y"], "probabilities": 0.5}, "expected 2 numbers"),
        ({"values": []}, r"values=\[\]: values must be a list of at least one value"),
        ({"values": "xy"}, "values=xy: values must be a list of at least one value"),
    ],
)
def test_shares_that_are_no_probabilities_are_one_line(node: dict[str, Any], text: str, method: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sweep_file.planned(sweep_of({"c": node}, method=method, run_cap=1))


def test_shares_rounded_to_four_decimals_are_probabilities() -> None:
    sweep_file.planned(
        sweep_of({"c": {"values": [1, 2, 3], "probabilities": [0.3333] * 3}}, method="random", run_cap=1)
    )
