"""Needs of Hydra beyond its documented interface: `vitscope.config.hydra_internals`.

Each test names one need. A failure after an upgrade means that the function it names has to be changed for the new release.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from tests.fixtures.programs.processes import ENVIRONMENT
from vitscope.config import composition, hydra_internals
from vitscope.runtime.errors import ConfigError


def test_overrides_of_every_kind_are_parsed() -> None:
    change, addition, removal, sweep = hydra_internals.parse_overrides(["a.b=[1,null]", "+c=1e-3", "~d", "e=1,2"])
    assert (change.key_or_group, change.value()) == ("a.b", [1, None])
    assert addition.is_add()
    assert addition.value() == 1e-3
    assert removal.is_delete()
    assert sweep.is_sweep_override()
    assert sweep.get_value_string() == "1,2"
    assert not any((change.is_add(), change.is_force_add(), change.is_delete(), change.is_sweep_override()))
    with pytest.raises(OverrideParseException):
        hydra_internals.parse_overrides(["a=[1"])


@pytest.mark.parametrize("arguments", [["--nope"], ["--cfg"], ["--cfg", "none"], ["a=1", "-x"]])
def test_an_unknown_option_is_refused_in_one_line(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="arguments"):
        hydra_internals.check_command_line(arguments)


def test_known_options_are_accepted() -> None:
    for arguments in (["--cfg", "job", "--resolve"], ["-m", "seed=0,1"], ["--help"], ["--config-dir", "x", "~a"]):
        hydra_internals.check_command_line(arguments)


def test_a_composition_is_judged_before_it_is_returned(tmp_path: Path) -> None:
    composition.install()
    (tmp_path / "a.yaml").write_text("hydra: {output_subdir: .hydra}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(ConfigError, match="output_subdir"):
        compose("a", return_hydra_config=True)


def test_a_search_path_is_judged_before_it_is_looked_into(tmp_path: Path) -> None:
    composition.install()
    (tmp_path / "a.yaml").write_text("hydra: {searchpath: [pkg://not_trusted]}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(ConfigError, match="searchpath"):
        compose("a")
    assert "not_trusted" not in sys.modules


PROGRAM = """
import sys
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from vitscope.config import composition, hydra_internals

class Folder(hydra_internals.Callback):
    def on_multirun_start(self, config, **kwargs):
        print("callback", config.hydra.sweep.dir)

@hydra.main(version_base="1.3", config_path={folder!r}, config_name="a")
def main(cfg):
    print("job", HydraConfig.get().mode == RunMode.MULTIRUN, list(HydraConfig.get().overrides.task))
    hydra_internals.clear_application()
    with hydra.initialize_config_dir({folder!r}, version_base="1.3"):
        print("inner", hydra.compose("a", overrides=["x=5"]).x)

if __name__ == "__main__":
    main()
"""


def test_a_multirun_calls_callbacks_and_composes_within_a_job(tmp_path: Path) -> None:
    """One process: `hydra.main` acts on a judged configuration, and a job can compose another one."""
    (tmp_path / "a.yaml").write_text(
        "x: 0\nhydra:\n  run: {dir: .}\n  output_subdir: null\n  sweep: {dir: out}\n"
        "  callbacks: {folder: {_target_: callback_package.Folder}}\n"
        "defaults: [_self_, {override hydra/job_logging: none}, {override hydra/hydra_logging: none}]\n"
    )
    program = tmp_path / "callback_package.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path)))
    environment = {
        **ENVIRONMENT,
        "VITSCOPE_TRUST": "callback_package",
        "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}",
    }
    done = subprocess.run(
        [sys.executable, str(program), "-m", "x=1,2"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line != "inner 5"] == ["callback out", "job True ['x=1']", "job True ['x=2']"]
    assert lines.count("inner 5") == 2


def test_targets_of_hydra_s_own_plugins_are_those_of_its_configuration() -> None:
    hydra_internals.clear_application()
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        hydra = compose("report", return_hydra_config=True).hydra
    assert OmegaConf.select(hydra, "launcher._target_") == hydra_internals.BASIC_LAUNCHER
    assert OmegaConf.select(hydra, "sweeper._target_") == hydra_internals.BASIC_SWEEPER
    module, _, name = hydra_internals.LOG_JOB_RETURN_CALLBACK.rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_no_application_is_left_behind() -> None:
    hydra_internals.clear_application()
    assert not GlobalHydra.instance().is_initialized()
