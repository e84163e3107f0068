"""Loggers beside W&B get every scalar of the metrics log, and a logger that fails costs a warning."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.fixtures.configs.configurations import composed
from tests.fixtures.runs.run_folders import only_run
from vitscope.config.keys import logger_choice
from vitscope.config.validation import validate_plain_values
from vitscope.runs import metrics_log, run_dir
from vitscope.runs.scalar_loggers import logger_factory, run_mirror
from vitscope.runs.scalar_loggers.run_mirror import RunMirror
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime.errors import ConfigError, StorageError

SHORT = ["analysis=[slice]", "analysis.slice.n=2", "probe.n_images=8", "trainer.limit_train_batches=2", "test=false"]
#: values of a row of the metrics log that are its place, not a metric
PLACE = ("step", "epoch", "time", "tag")


class Recorder:
    """A logger that keeps its rows."""

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []
        self.status: str | None = None
        self.fails = fails

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.fails:
            raise ConnectionError("no\nserver")
        self.rows.append((metrics, step))

    def finalize(self, status: str) -> None:
        self.status = status


def config(tmp_path: Path, **loggers: Any) -> DictConfig:
    keys = {"paths": {"runs": str(tmp_path / "runs")}, "seed": 1, "name": "vit", "tags": ["a", "b"]}
    return OmegaConf.create({**keys, "logger": loggers})


def metrics_of(run: Path) -> set[tuple[int, str, float]]:
    """Return (step, metric, value) of every scalar in the metrics log."""
    rows = metrics_log.read(run / metrics_log.FILE)
    return {(row["step"], name, value) for row in rows for name, value in row.items() if name not in PLACE}


def test_a_csv_file_holds_the_scalars_of_training_and_analyses(call, tiny, tmp_path: Path) -> None:
    arguments = [argument for argument in tiny if not argument.startswith(("logger=", "trainer.limit_train"))]
    assert call("train", *arguments, *SHORT, "logger=csv", "trainer.max_epochs=1") == 0
    run = only_run(tmp_path)
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    copied = {
        (int(row["step"]), name, float(value))
        for row in rows
        for name, value in row.items()
        if value and name not in PLACE
    }
    expected = metrics_of(run)
    assert {name for _, name, _ in expected} >= {"train/loss", "val/accuracy", "slice/nll_minimum"}
    assert copied == expected
    assert not (run / "wandb").exists(), "logger=csv is without W&B"
    assert call("analyze", f"run={run}", *SHORT[:2], "probe.n_images=9", "logger=csv") == 0
    assert "slice/nll_minimum" in (run / "csv" / "version_1" / "metrics.csv").read_text()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an optional package")
def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path, tensorboard={"flush_secs": 1})
    run = run_dir.create(cfg, "train")
    mirror = run_mirror.start(cfg, run, "train")
    mirror.log({"train/loss": 0.5, "epoch": 0}, 3)
    mirror.log({"train/loss": 0.25}, 4)
    mirror.finish(0)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5), (4, 0.25)]


def test_each_logger_gets_finite_numbers_and_the_end() -> None:
    first, second = Recorder(), Recorder()
    mirror = RunMirror(None, {"first": first, "second": second})
    mirror.log({"a": 1, "b": math.nan, "c": "text", "d": True, "e": 0.5}, 7)
    mirror.log({"b": math.inf}, 8)
    mirror.finish(2)
    assert first.rows == second.rows == [({"a": 1, "e": 0.5}, 7)]
    assert (first.status, second.status) == ("failed", "failed")


def test_a_logger_that_fails_costs_one_warning() -> None:
    broken, works = Recorder(fails=True), Recorder()
    mirror = RunMirror(None, {"broken": broken, "works": works})
    with pytest.warns(UserWarning, match="logger broken: ConnectionError: no server; it gets no further rows"):
        mirror.log({"a": 1.0}, 0)
    mirror.log({"a": 2.0}, 1)  # a second warning would be an error
    mirror.finish(0)
    assert [step for _, step in works.rows] == [0, 1]
    assert (broken.status, works.status) == (None, "success")


def test_a_logger_that_does_not_start_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(logger_factory, "CSVLogger", broken)
    cfg = config(tmp_path, csv={"flush_logs_every_n_steps": 1})
    with pytest.warns(UserWarning, match="logger csv: OSError: no disk; not started"):
        mirror = run_mirror.start(cfg, run_dir.create(cfg, "train"), "train")
    assert type(mirror) is WandbMirror


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_link_in_the_place_of_a_logger_s_folder_is_refused(name: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, **{name: {}})
    run = run_dir.create(cfg, "train")
    (run.path / name).symlink_to(tmp_path)
    with pytest.raises(StorageError):
        run_mirror.start(cfg, run, "train")


def test_mlflow_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    parameters: list[dict[str, Any]] = []

    class Logger(Recorder):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            started.append(arguments)
            self.run_id = arguments["run_id"] or "f00"

        def log_hyperparams(self, params: dict[str, Any]) -> None:
            parameters.append(params)

    monkeypatch.setattr(logger_factory, "MLFlowLogger", Logger)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg = config(tmp_path, mlflow={"experiment_name": "mine"})
    run = run_dir.create(cfg, "train")
    run_mirror.start(cfg, run, "train")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:9")
    run_mirror.start(cfg, run, "train")
    first, second = started
    assert first["tracking_uri"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert first["tags"] == {"vitscope.tags": "a,b", "vitscope.name": "vit"}
    assert (first["run_id"], first["run_name"], first["experiment_name"]) == (None, run.id, "mine")
    assert (second["run_id"], second["tracking_uri"]) == ("f00", "http://localhost:9")
    assert len(parameters) == 1, "MLflow refuses parameters that change"
    assert parameters[0]["seed"] == 1


def test_trackio_is_called_as_w_and_b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    own_run = SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", (metrics, step))), finish=lambda: calls.append(("finish", None))
    )

    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        return own_run

    module = ModuleType("trackio")
    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    cfg = config(tmp_path, trackio={"project": "mine"})
    run = run_dir.create(cfg, "train")
    mirror = run_mirror.start(cfg, run, "train")
    mirror.log({"train/loss": 0.5}, 3)
    mirror.finish(0)
    (_, arguments), *rest = calls
    assert rest == [("log", ({"train/loss": 0.5}, 3)), ("finish", None)]
    expected = {"project": "mine", "name": run.id, "group": "vit", "resume": "allow", "embed": False}
    assert {key: value for key, value in arguments.items() if key != "config"} == expected
    assert json.loads(json.dumps(arguments["config"]))["seed"] == 1


@pytest.mark.parametrize("choice", ["csv", "[wandb,csv]", "[csv,none]", "none", "wandb"])
@pytest.mark.parametrize("command", ["train", "analyze"])
def test_choices_of_loggers_compose(command: str, choice: str) -> None:
    cfg = composed(command, "model=vit", f"logger={choice}")
    validate_plain_values(cfg)
    assert list(logger_choice.chosen_loggers(cfg.logger)) == (["csv"] if "csv" in choice else [])
    assert cfg.logger.get("project") == ("vitscope" if "wandb" in choice else None)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["logger=mlflow"], "logger=mlflow: the package mlflow is not installed; pip install mlflow, or choose logger=csv"),
        (["logger=[csv,trackio]"], "logger=trackio: the package trackio is not installed; pip install trackio, or"),
        (["logger=csv", "logger.csv.flush_logs_every_n_steps=0"], "not a whole number from 1 on"),
        (["logger=csv", "+logger.csv.flush=3"], "logger.csv.flush=3: no such key; choose from flush_logs_every_n_steps"),
        (["logger=csv", "+logger.cvs={}"], "logger.cvs=...: no such logger; did you mean csv"),
    ],
)  # fmt: skip
def test_a_logger_that_cannot_work_is_refused(overrides: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    optional = {package for packages in logger_choice.PACKAGES.values() for package in packages}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in optional else find(name))
    with pytest.raises(ConfigError) as refused:
        validate_plain_values(composed("train", "model=vit", *overrides))
    assert text in str(refused.value)
