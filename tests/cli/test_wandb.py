"""W&B is a mirror: whatever happens to its server or its process, training ends well and the journal has every step."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.fixtures.programs.processes import wait_until
from tests.fixtures.programs.wandb_server import Server
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.runs import wandb_mirror
from vitscope.training.lightning_module import Classifier

ONLINE = ["logger=wandb", "analysis=[]", "test=false", "trainer.limit_train_batches=6"]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """W&B reads the environment once a process: these tests change it."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Start the stand-in; W&B's client in this process talks to it."""
    started = Server()
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    for name, value in {**started.environment, "HOME": str(tmp_path), "WANDB_FINISH_TIMEOUT": "5"}.items():
        monkeypatch.setenv(name, value)
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


def arguments(tiny: list[str]) -> list[str]:
    return [*(a for a in tiny if a != "logger=none"), *ONLINE]


@pytest.mark.slow  # it waits for W&B to give up
@pytest.mark.filterwarnings("ignore::UserWarning:wandb.*", "ignore:W&B. ")
def test_a_server_that_goes_away_in_the_middle(call, tiny, server, tmp_path, monkeypatch) -> None:
    """Rows came through before; afterwards they are in the journal alone, and the wait at the end is the one that was set."""
    begin = Classifier.on_train_batch_start

    def dying(self: Classifier, batch: object, batch_idx: int) -> None:
        if batch_idx == 3:
            wait_until(lambda: any(run.config for run in server.runs.values()), "configuration on the server")
            server.vanish()
        begin(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "on_train_batch_start", dying)
    assert call("train", *arguments(tiny)) == 0  # it ends: W&B's own default waits for the server without end
    (seen,) = server.runs.values()
    assert seen.config["optimizer.lr"] == 0.001
    assert seen.exit_code is None, "it heard of the end"
    run = only_run(tmp_path)
    assert sorted(losses(run)) == list(range(6))
    facts = json.loads((run / "provenance.json").read_text())
    assert (facts["status"], facts["wandb_id"]) == ("finished", seen.name)


@pytest.mark.filterwarnings("ignore::UserWarning:wandb.*")
def test_a_server_that_is_not_there(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    """A key, and nobody who listens: offline after the patience that was set, in one line."""
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online",
                   "WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3", "HOME": str(tmp_path)}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert call("train", *arguments(tiny)) == 0
    run = only_run(tmp_path)
    assert sorted(losses(run)) == list(range(6))
    err = capsys.readouterr().err
    assert "W&B: not started" in err
    assert err.count("W&B: not started") == 1
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_no_key(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("train", *arguments(tiny)) == 0
    assert "W&B: no key configured, so the run is logged offline" in capsys.readouterr().err
    run = only_run(tmp_path)
    assert sorted(losses(run)) == list(range(6))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("error", [RuntimeError("gone\naway"), ConnectionResetError("gone"), BrokenPipeError("gone")])
def test_whatever_wandb_raises_costs_a_warning(error: Exception) -> None:
    class Broken:
        def __getattr__(self, name: str):
            raise error

    mirror = wandb_mirror.WandbMirror(Broken())
    for action in (lambda: mirror.log({"a": 1.0}, 1), lambda: mirror.summary({"a": 1}), mirror.preempting,
                   lambda: mirror.table("t", ["a"], [[1]]), lambda: mirror.histogram("h", [1.0], 1),
                   lambda: mirror.finish(0)):  # fmt: skip
        with pytest.warns(UserWarning, match="metrics.jsonl has every row") as caught:
            action()
        assert "\n" not in str(caught[0].message)
