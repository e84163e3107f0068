"""Hydra's own part of a configuration is judged before Hydra acts on it."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vitscope.cli import analyze, exit_codes, report, train
from vitscope.config import composition, hydra_internals, loading, target_allowlist
from vitscope.reproduce import trial
from vitscope.runtime import trusted_packages
from vitscope.runtime.errors import ConfigError

PROOF = "a command of the configuration ran"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Put a module on the path whose every name notes that it was called."""
    calls: list[str] = []

    def noted(*args: object, **kwargs: object) -> None:
        calls.append(PROOF)

    def attribute(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return noted

    stranger = types.ModuleType("stranger_package")
    setattr(stranger, "__getattr__", attribute)  # noqa: B010  a module has no such attribute for a type checker
    monkeypatch.setitem(sys.modules, "stranger_package", stranger)
    yield calls
    os.environ.pop("VITSCOPE_TRUST", None)


CALLED = "stranger_package.run"
FOLDER = "vitscope.sweep.hydra_multirun.Folder"
#: what a configuration file may hold below `hydra`, and the key that the refusal names
HOSTILE = [
    ({"callbacks": {"x": {"_target_": CALLED}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "torch.utils.collect_env.run", "command": "true"}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": FOLDER, "y": {"_target_": CALLED}}}}, "hydra.callbacks.x.y"),
    ({"callbacks": {"x": {"_target_": FOLDER, "y": [{"z": {"_target_": CALLED}}]}}}, "y.0.z"),
    ({"callbacks": {"x": "${y}"}, "y": {"_target_": CALLED}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "${y}"}}, "y": CALLED}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "${oc.env:STRANGER}"}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "pandas.read_pickle"}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "builtins.exec", "_args_": ["1"]}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": "vitscope.models.vit"}}}, "hydra.callbacks.x._target_"),
    ({"callbacks": {"x": {"_target_": [FOLDER]}}}, "hydra.callbacks.x._target_"),
    ({"launcher": {"_target_": CALLED}}, "hydra.launcher._target_"),
    ({"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher", "x": {"_target_": CALLED}}}, "x._t"),
    ({"launcher": {"setup": ["touch x"]}}, "hydra.launcher.setup"),
    ({"launcher": {"additional_parameters": {"wrap": "x"}}}, "hydra.launcher.additional_parameters"),
    ({"launcher": {"partition": "gpu\ntouch x"}}, "hydra.launcher.partition"),
    ({"sweeper": {"_target_": CALLED}}, "hydra.sweeper._target_"),
    ({"sweeper": {"sampler": {"_target_": CALLED}}}, "hydra.sweeper.sampler._target_"),
    ({"sweeper": {"sampler": {"_target_": "optuna.samplers.TPESampler", "gamma": {"_target_": CALLED}}}}, "sampler.gamma"),
    ({"sweeper": {"custom_search_space": CALLED}}, "hydra.sweeper.custom_search_space"),
    ({"job": {"env_set": {"VITSCOPE_TRUST": "stranger_package"}}}, "hydra.job.env_set"),
    ({"job": {"env_copy": ["VITSCOPE_TRUST"]}}, "hydra.job.env_copy"),
    ({"job": {"env_set": {"PATH": "/x"}}}, "hydra.job.env_set"),
    ({"job": {"env_set": {"LD_PRELOAD": "/x"}}}, "hydra.job.env_set"),
    ({"job": {"env_set": {"CXX": "/x"}}}, "hydra.job.env_set"),
    ({"job": {"env_set": {"WANDB_BASE_URL": "http://x"}}}, "hydra.job.env_set"),
    ({"job": {"env_set": {"MPLBACKEND": "module://x"}}}, "hydra.job.env_set"),
    ({"job": {"env_copy": ["NOT_SET_ANYWHERE"]}}, "hydra.job.env_copy"),
    ({"job_logging": {"version": 1, "handlers": {"x": {"()": CALLED}}}}, "hydra.job_logging.handlers.x.()"),
    ({"job_logging": {"version": 1, "handlers": {"x": {"class": CALLED}}}}, "hydra.job_logging.handlers.x.class"),
    ({"job_logging": {"version": 1, "formatters": {"x": {"()": {"()": CALLED}}}}}, "hydra.job_logging.formatters.x.()"),
    ({"job_logging": {"handlers": {"x": {"class": "logging.StreamHandler", "stream": f"ext://{CALLED}"}}}}, "x.stream"),
    ({"job_logging": {"handlers": "${y}"}, "y": {"x": {"()": CALLED}}}, "hydra.job_logging.handlers"),
    ({"job_logging": {"handlers": {"x": {"class": "${y}"}}}, "y": CALLED}, "hydra.job_logging.handlers.x.class"),
    ({"hydra_logging": {"version": 1, "filters": {"x": {"()": CALLED}}}}, "hydra.hydra_logging.filters.x.()"),
    ({"job_logging": {"version": 1, "formatters": {"x": {"format": "touch x"}}, "root": {"handlers": ["x"]}, "handlers": {
        "x": {"class": "logging.FileHandler", "filename": "/home/user/.profile", "formatter": "x"}}}}, "handlers.x.filename"),
    ({"job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "train.py", "mode": "w"}}}}, "x.filename"),
    ({"job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "../x.log"}}}}, "x.filename"),
    ({"job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "${oc.env:HOME}/x.log"}}}}, "x.filename"),
    ({"hydra_logging": {"handlers": {"x": {"class": "logging.handlers.RotatingFileHandler", "filename": "${y}"}}},
      "y": "/etc/x"}, "x.filename"),
    ({"job_logging": {"handlers": {"x": {"class": "logging.StreamHandler", "level": "${y}"}}}, "y": "ext://a.b"}, "x.level"),
    ({"job_logging": {"formatters": {"x": {"format": "${y}"}}}, "y": "ext://a.b"}, "formatters.x.format"),
    ({"job": {"chdir": True}, "run": {"dir": "/tmp/stranger"}}, "hydra.job.chdir"),
    ({"job": {"chdir": "${y}"}, "y": True}, "hydra.job.chdir"),
    ({"sweeper": {"storage": "redis://stranger/0"}}, "hydra.sweeper.storage"),
    ({"sweeper": {"storage": "mysql+pymysql://stranger/db"}}, "hydra.sweeper.storage"),
    ({"sweeper": {"storage": {"url": "redis://stranger/0"}}}, "hydra.sweeper.storage"),
    ({"_target_": CALLED}, "hydra._target_"),
    ({"output_subdir": ".hydra"}, "hydra.output_subdir"),
    ({"help": {"x": {"_target_": CALLED}}}, "hydra.help.x._target_"),
]  # fmt: skip


def written(folder: Path, content: dict, name: str = "stranger") -> list[str]:
    """Write an experiment file of a stranger; return the arguments that choose it."""
    rest = {key: value for key, value in content.items() if key == "y"}
    hydra = {key: value for key, value in content.items() if key != "y"}
    file = folder / "conf" / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra, **rest})))
    return ["--config-dir", str(folder / "conf"), f"+experiment={name}"]


def command_of(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)
    return exit_codes.run_command({"train": train, "analyze": analyze, "report": report}[name]._command)


@pytest.mark.parametrize(("content", "key"), HOSTILE, ids=str)
def test_hydra_s_own_part_is_judged(
    content: dict, key: str, monkeypatch: pytest.MonkeyPatch, module: list[str]
) -> None:
    monkeypatch.setenv("STRANGER", CALLED)
    rest = {name: value for name, value in content.items() if name == "y"}
    cfg = OmegaConf.create({"hydra": {name: value for name, value in content.items() if name != "y"}, **rest})
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        composition.judge(cfg)
    assert "\n" not in str(caught.value)
    assert not module


#: of each kind one, by the command itself
THROUGH_A_FILE = [case for case in HOSTILE if case[1] in (
    "hydra.callbacks.x._target_", "hydra.launcher._target_", "hydra.sweeper._target_", "hydra.job.env_set",
    "hydra.job.env_copy", "hydra.job_logging.handlers.x.()", "hydra.output_subdir")]  # fmt: skip


@pytest.mark.parametrize(("content", "key"), THROUGH_A_FILE[1:2] + THROUGH_A_FILE[3:4] + THROUGH_A_FILE[-9:], ids=str)
def test_an_experiment_file_calls_nothing(
    content: dict, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    module: list[str],
) -> None:  # fmt: skip
    """One line that names the key, exit 2, nothing called, no run folder, no trust."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STRANGER", CALLED)
    chosen = written(tmp_path, content)
    chosen[2] = chosen[2].lstrip("+")
    assert command_of(monkeypatch, "train", *chosen, f"paths.runs={tmp_path}/runs") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert key in said
    assert not module
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conf"]


@pytest.mark.parametrize("command", ["train", "analyze", "report"])
@pytest.mark.parametrize("multirun", [False, True])
def test_every_command_judges(
    command: str, multirun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    module: list[str],
) -> None:  # fmt: skip
    """The experiment of the report: trust by ``env_set`` and a callback of a package that nobody named, with ``-m`` too."""
    monkeypatch.chdir(tmp_path)
    grants = {"job": {"env_set": {"VITSCOPE_TRUST": "stranger_package"}}, "callbacks": {"x": {"_target_": CALLED}}}
    chosen = written(tmp_path, grants)
    chosen[2] = chosen[2] if command == "report" else chosen[2].lstrip("+")
    given = [*["-m"] * multirun, *chosen, f"paths.runs={tmp_path}/runs"]
    assert command_of(monkeypatch, command, *given) == 2
    assert "hydra.job.env_set=VITSCOPE_TRUST" in capsys.readouterr().err
    assert not module
    assert "VITSCOPE_TRUST" not in os.environ


@pytest.mark.parametrize("argument", [f"+hydra.callbacks.x._target_={CALLED}", f"hydra.launcher._target_={CALLED}",
                                      "+hydra.job.env_set.VITSCOPE_TRUST=stranger_package",
                                      f"hydra.sweeper._target_={CALLED}"])  # fmt: skip
def test_overrides_are_judged_too(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_of(monkeypatch, "train", argument, f"paths.runs={tmp_path}/runs") == 2
    assert not module


def test_a_job_of_a_multirun_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: list[str]
) -> None:
    """A job composes anew: what only its own experiment says is judged before Hydra applies it."""
    monkeypatch.chdir(tmp_path)
    chosen = written(tmp_path, {"job": {"env_set": {"VITSCOPE_TRUST": "stranger_package"}}}, "second")
    (tmp_path / "conf" / "experiment" / "first.yaml").write_text("# @package _global_\nseed: 1\n")
    monkeypatch.setattr(train.hydra_multirun, "job", lambda metric: 0.0)
    arguments = ["-m", *chosen[:2], "experiment=first,second", f"paths.runs={tmp_path}/runs"]
    assert command_of(monkeypatch, "train", *arguments) == 2
    assert "hydra.job.env_set=VITSCOPE_TRUST" in capsys.readouterr().err
    assert "VITSCOPE_TRUST" not in os.environ


def test_a_composed_trial_is_judged(tmp_path: Path, module: list[str]) -> None:
    wanted = trial.Trial((f"+hydra.callbacks.x._target_={CALLED}",))
    with pytest.raises(ConfigError, match=r"hydra\.callbacks\.x\._target_"):
        trial.composed(wanted, tmp_path)
    assert not module


@pytest.mark.parametrize("where", ["override", "file"])
def test_a_search_path_imports_no_package(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would import the package in order to look into it, before anything is composed."""
    (tmp_path / "searched_package").mkdir()
    (tmp_path / "searched_package" / "__init__.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["hydra.searchpath=[pkg://searched_package]"]
    if where == "file":
        (tmp_path / "primary.yaml").write_text("hydra: {searchpath: ['pkg://searched_package.conf']}\n")
        arguments = ["--config-dir", str(tmp_path), "--config-name", "primary"]
    assert command_of(monkeypatch, "train", *arguments) == 2
    assert "hydra.searchpath=pkg://searched_package" in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("option", ["--experimental-rerun", "--experimental", "-er"])
def test_no_pickled_job_is_run_again(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_of(monkeypatch, "train", option, "folder") == 2
    assert "would load a pickle" in capsys.readouterr().err


def test_trust_is_read_before_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What appears in the environment while a command runs does not count; what was there before does."""
    monkeypatch.setenv("VITSCOPE_TRUST", "collections, mylab")
    with trusted_packages.held():
        monkeypatch.setenv("VITSCOPE_TRUST", "subprocess")
        assert trusted_packages.packages() == {"collections", "mylab"}
        with pytest.raises(ConfigError, match="VITSCOPE_TRUST=subprocess"):
            target_allowlist.resolve("subprocess.check_output", "model")
    assert trusted_packages.packages() == {"subprocess"}


def composed(*overrides: str) -> object:
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("given", [
    ["hydra/job_logging=default", "hydra/hydra_logging=default"], ["hydra/job_logging=stdout"],
    ["+hydra.job.env_set.OMP_NUM_THREADS=1", "+hydra.job.env_set.WANDB_MODE=offline"], ["hydra.searchpath=[file://.]"],
    ["hydra/launcher=local"], ["hydra/launcher=slurm", "hydra.launcher.setup=[module load cuda]"], ["hydra/sweeper=bayes"],
    ["hydra/launcher=parallel"], ["hydra.callbacks.jobs=null"],
    ["hydra/sweeper=bayes", "hydra.sweeper.storage=sqlite:///studies/a.db"],
    ["hydra/sweeper=bayes", "hydra.sweeper.storage=mysql://host/db"],
    ["hydra/job_logging=default", "hydra.job_logging.handlers.file.filename=train.log"],
])  # fmt: skip
def test_what_a_user_may_set(given: list[str]) -> None:
    cfg = composed(*given)
    assert cfg.hydra.output_subdir is None


def test_a_package_that_the_user_trusts_may_be_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCOPE_TRUST", "collections")
    assert composed("+hydra.callbacks.own._target_=collections.OrderedDict")


def test_what_was_judged_is_what_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpolation is read once: another value at another time would have passed unjudged."""
    monkeypatch.setenv("CHANGING", FOLDER)
    cfg = OmegaConf.create({"hydra": {"callbacks": {"x": {"_target_": "${oc.env:CHANGING}"}}}})
    composition.judge(cfg)
    monkeypatch.setenv("CHANGING", "subprocess.check_output")
    assert cfg.hydra.callbacks.x._target_ == FOLDER
    with pytest.raises(ConfigError, match="VITSCOPE_TRUST=subprocess"):
        composition.judge(OmegaConf.create({"hydra": {"callbacks": {"x": {"_target_": "${oc.env:CHANGING}"}}}}))


@pytest.mark.parametrize(
    "text", ["runs/a", "/a b ", "/josé/中", "/a,b", "/lr=0.1", "/study (2)", "/it's", '/"x"', "/a#b&c;d!", "/[x]{y}", "/a\\'"]
)  # fmt: skip
def test_commands_hand_any_path_over(text: str) -> None:
    (override,) = hydra_internals.parse_overrides([loading.path_override("paths.runs", Path(text))])
    assert (override.value(), override.is_sweep_override()) == (text, False)
