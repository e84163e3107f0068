"""`wandb sweep`, two `wandb agent`s and `wandb sync`, the real ones, against a server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.fixtures.programs.wandb_server import Server
from vitscope.runs import run_search
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import sweep_file, trial_process, wandb_agents

ROOT = Path(__file__).parents[2]
TINY = [
    "model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "analysis=[]", "test=false", "caps=smoke",
    "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Start the stand-in; every W&B client of this test talks to it."""
    started = Server()
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


@pytest.mark.usefixtures("command_messages")
def test_two_agents_run_a_sweep(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.yaml"
    text = (ROOT / "sweeps" / "models.yaml").read_text()
    lines = [
        line for line in text.splitlines() if not line.startswith(("  experiment", "  seed", "  model", "  logger"))
    ]
    # the first rate trains; the second is refused by the command before it has a run folder
    added = ["parameters:", "  optimizer.lr: {values: [1.0e-3, -1.0]}", "  logger.group: {value: rates}"]
    file.write_text("\n".join(lines).replace("parameters:", "\n".join(added)))
    sweep = sweep_file.read(file, TINY)
    sweep_id = wandb_agents.create(sweep)
    assert sweep_id == "tests/vitscope/sweep0"
    folder = tmp_path / "sweep"
    code = wandb_agents.run(sweep, sweep_id, folder, trial_process.slots(None, 2))
    shown = capfd.readouterr()
    assert code == 2
    assert (
        "failed: W&B run run1 left no run folder" in shown.err or "failed: W&B run run0 left no run folder" in shown.err
    )
    assert "1 of 1 trials finished" in shown.out
    assert len(server.agents) == 2
    assert server.sweeps["sweep0"].state == "FINISHED"
    assert [query for query in server.unknown if "rtifact" not in query] == []  # it keeps no tables
    (run,) = run_search.every(folder)
    mirrored = server.runs[run.provenance()["wandb_id"]]
    assert (mirrored.sweep, mirrored.group, mirrored.job_type, mirrored.exit_code) == ("sweep0", "rates", "train", 0)
    assert (mirrored.config["optimizer.lr"], mirrored.config["model.depth"]) == (1.0e-3, 1)
    assert not any(isinstance(value, dict) and value for value in mirrored.config.values())
    ours = [json.loads(line) for line in run.journal.read_text().splitlines()]
    losses = [row["train/loss"] for row in ours if "train/loss" in row]
    assert losses == pytest.approx([row["train/loss"] for row in mirrored.history if "train/loss" in row])
    assert len(losses) == 3
    # what is on disk can be sent again, to another run
    (local,) = (run.path / "wandb").glob("run-*")
    options = ["--yes", "--include-online", "--id", "again", "-p", "vitscope", "-e", "tests"]
    sync = [str(Path(sys.executable).parent / "wandb"), "sync", *options, str(local)]
    subprocess.run(sync, check=True, capture_output=True, env={**os.environ, "WANDB_DIR": str(tmp_path)})
    assert [row["train/loss"] for row in server.runs["again"].history if "train/loss" in row] == pytest.approx(losses)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_first_trial_of_every_file_runs_under_an_agent(
    file: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_file.read(file, ["profile=smoke", "caps=smoke", "trainer.accelerator=cpu"])
    folder = tmp_path / "sweep"
    code = wandb_agents.run(sweep, wandb_agents.create(sweep), folder, trial_process.slots(None, 1), limit=1)
    assert code == 0, capfd.readouterr().err
    (run,) = run_search.every(folder)
    assert "recorded as null" not in (folder / "agent-cpu0.log").read_text()
    mirrored = server.runs[run.provenance()["wandb_id"]]
    assert (mirrored.group, mirrored.job_type, mirrored.exit_code) == (file.stem, "train", 0)
    config = run.config()
    for key in (key for key in sweep.swept if "." in key):  # flat, so that a table has a column for each
        assert _plain(mirrored.config[key]) == _plain(OmegaConf.select(config, key)), key


def _plain(value: object) -> str:
    return str(value).replace(" ", "")  # a list was handed out as a text


def test_a_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_agents, "_wandb", lambda: "false")
    with pytest.raises(ConfigError, match="wandb sweep failed .no answer.; run wandb login"):
        wandb_agents.create(sweep_file.read(ROOT / "sweeps" / "models.yaml"))


@pytest.mark.usefixtures("command_messages")
def test_failed_trials_are_read_from_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(name: str, status: str, code: int | None, wandb_id: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        facts = {"status": status, "exit_code": code, "wandb_id": wandb_id}
        (folder / "provenance.json").write_text(json.dumps(facts))

    made("a", "finished", 0, "one")
    assert wandb_agents.report(tmp_path) == 0
    made("b", "failed", 5, "two")
    (tmp_path / "b" / "log.txt").write_text("Traceback\nNumericalError: optimizer.lr: x is not finite\n")
    made("c", "running", None, "three")
    started = tmp_path / "wandb" / "sweep-s"
    started.mkdir(parents=True)
    for name in ("one", "two", "three", "four"):
        (started / f"config-{name}.yaml").touch()
    capsys.readouterr()
    assert wandb_agents.report(tmp_path, broken=1) == 5
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        f"{tmp_path}/b", f"{tmp_path}/c", "W&B run four left no run folder; see " + f"{tmp_path}/agent-*.log",
        f"1 agent ended with an error; see {tmp_path}/agent-*.log",
    ]  # fmt: skip
    assert "not finite" in lines[0]
    assert "killed" in lines[1]
    made("d", "stopped", signal.SIGTERM + 128, "five")
    assert wandb_agents.report(tmp_path, may_stop=True) == 5
    assert "2 of 4 trials finished" in capsys.readouterr().out


def test_only_trials_with_a_hash_of_their_own_go_on_by_it() -> None:
    parameters = {"seed": {"values": [0, 1]}, "analysis.hessian.n_top": {"value": 3}}
    sweep = sweep_file.Sweep(Path("x.yaml"), {"parameters": parameters})
    assert wandb_agents.content(sweep)["parameters"]["ckpt_path"] == {"value": "auto"}
    varied = sweep_file.Sweep(Path("x.yaml"), {"parameters": {"analysis.hessian.n_top": {"values": [3, 4]}}})
    assert "ckpt_path" not in wandb_agents.content(varied)["parameters"]
