"""Commands compose plain overrides themselves and go through `hydra.main` where only that can do what is asked."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError

from vitscope.cli import hydra_command
from vitscope.cli.hydra_command import FULL_ERROR
from vitscope.runtime.errors import ConfigError

PLAIN = ["model=vit", "seed=3"]
THROUGH_MAIN = ["+hydra.job.env_set.TZ=UTC", "hydra.verbose=false", "hydra/job_logging=default"]


@pytest.fixture(autouse=True)
def root_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the handlers that Hydra gives to the root logger: their streams are the test's, their files in its folder."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


class Received:
    """A task that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def task(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        runtime = HydraConfig.get().runtime
        facts = {
            "full_error": os.environ.get(FULL_ERROR),
            "choice": runtime.choices.model,
            "output_dir": runtime.output_dir,
        }
        self.calls.append({"cfg": cfg, "overrides": list(overrides), **facts})


@pytest.fixture
def mains(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the uses of `hydra.main`."""
    used: list[str] = []
    original = hydra.main

    def counted(**options: Any) -> Any:
        used.append(options["config_name"])
        return original(**options)

    monkeypatch.setattr(hydra, "main", counted)
    return used


def run(arguments: Sequence[str]) -> dict[str, Any]:
    received = Received()

    def task(cfg: DictConfig, overrides: Sequence[str]) -> None:
        received.task(cfg, overrides)

    hydra_command.run_composed("train", arguments, task)
    (call,) = received.calls
    return call


def test_plain_overrides_are_composed_without_hydra_main(mains: list[str]) -> None:
    call = run(PLAIN)
    assert mains == []
    assert call["overrides"] == ["model=vit", "seed=3"]
    assert call["cfg"].seed == 3
    assert call["choice"] == "vit"
    assert "hydra" not in call["cfg"]
    with pytest.raises(ConfigAttributeError, match="nokey"):
        call["cfg"].nokey = 1


@pytest.mark.parametrize("argument", THROUGH_MAIN)
def test_keys_of_hydra_go_through_its_main(
    argument: str, mains: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    before = list(sys.argv)
    call = run(["model=vit", argument])
    assert mains == ["train"]
    assert call["choice"] == "vit"
    assert sys.argv == before


def test_both_ways_compose_the_same(mains: list[str]) -> None:
    one, other = run(["model=vit"]), run(["model=vit", "hydra.verbose=false"])
    assert mains == ["train"]
    assert one["cfg"] == other["cfg"]


@pytest.mark.parametrize("arguments", [[], ["hydra.verbose=false"]])
def test_values_of_hydra_can_be_referred_to(arguments: list[str], tmp_path: Path) -> None:
    call = run([*arguments, "+logger.name='${hydra:job.name} ${hydra:runtime.choices.model}'", "model=vit"])
    assert call["cfg"].logger.name == "train vit"
    assert call["output_dir"] == str(tmp_path)


@pytest.mark.parametrize("value", [None, "1"])
@pytest.mark.parametrize("arguments", [[], ["hydra.verbose=false"]])
def test_the_task_sees_the_environment_of_the_user(
    arguments: list[str], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FULL_ERROR, raising=False)
    if value is not None:
        monkeypatch.setenv(FULL_ERROR, value)
    assert run(arguments)["full_error"] == value
    assert os.environ.get(FULL_ERROR) == value


@pytest.mark.parametrize("arguments", [[], ["hydra.verbose=false"]])
def test_what_a_task_raises_is_raised(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = KeyboardInterrupt("of the task")

    def task(cfg: DictConfig, overrides: Sequence[str]) -> None:
        raise error

    with pytest.raises(KeyboardInterrupt) as caught:
        hydra_command.run_composed("report", arguments, task)
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --nope"):
        hydra_command.run_composed("report", ["--nope"], lambda cfg, overrides: None)


@pytest.mark.parametrize(
    ("arguments", "reordered"),
    [
        ("a=1 --config-dir x=y b=2 ~c", "--config-dir x=y a=1 b=2 ~c"),
        ("a=1 --cfg job --resolve +b=2", "--cfg job --resolve a=1 +b=2"),
        ("--info a=1", "--info a=1"),
        ("a=1 --info searchpath b=2", "--info searchpath a=1 b=2"),
        ("-m a=1,2 -cd x b=2", "-m -cd x a=1,2 b=2"),
        ("", ""),
    ],
)
def test_options_may_stand_between_overrides(arguments: str, reordered: str) -> None:
    assert hydra_command.overrides_last(arguments.split()) == reordered.split()
