"""Two ranks of an analysis: joined by torchrun's or SLURM's variables, and ended where one hangs, not where one is slow."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.fixtures.programs.processes import ForkedProcess
from vitscope.analyses import process_group, rank_request
from vitscope.analyses.rank_request import RankRequest
from vitscope.cli import exit_codes
from vitscope.config import loading
from vitscope.runtime import distributed, stop_flag
from vitscope.runtime.errors import ConfigError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_variables(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}  # fmt: skip


def slurm_variables(rank: int, port: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
            "SLURM_JOB_ID": "17", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}  # fmt: skip


def ranks(command: Callable[[], None], folder: Path, variables: Callable[[int, int], dict[str, str]]) -> list:
    """Return the exit code and the standard error of two forked ranks."""
    port = free_port()
    processes = [
        ForkedProcess(lambda: exit_codes.run_command(command), folder / f"errors-{rank}", variables(rank, port))
        for rank in range(2)
    ]
    return [process.wait(60) for process in processes]


@pytest.mark.parametrize("variables", [torchrun_variables, slurm_variables])
def test_ranks_meet(tmp_path: Path, variables: Callable[[int, int], dict[str, str]]):
    def command() -> None:
        request = rank_request.take_request(OmegaConf.create({"device": "cpu"}))
        with process_group.joined(request, "cpu"):
            (tmp_path / f"rank-{distributed.rank()}").write_text(str(distributed.gather_objects(distributed.rank())))

    assert ranks(command, tmp_path, variables) == [(0, ""), (0, "")]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["[0, 1]", "[0, 1]"]


@pytest.mark.slow
def test_a_slow_rank_is_waited_for_and_a_hung_one_is_not(tmp_path: Path):
    """Rank 1 first takes longer than the timeout while it advances, and then stands still."""

    def command() -> None:
        with process_group.joined(RankRequest(0, timeout_s=0.8), "cpu"):
            for _ in range(16 if distributed.rank() == 1 else 0):
                time.sleep(0.1)
                stop_flag.check()
            distributed.gather_objects(None)
            (tmp_path / f"passed-{distributed.rank()}").touch()
            if distributed.rank() == 1:
                time.sleep(4)
            distributed.gather_objects(None)
            (tmp_path / f"after-{distributed.rank()}").touch()

    (code, errors), _ = ranks(command, tmp_path, torchrun_variables)
    assert (tmp_path / "passed-0").exists()
    assert (tmp_path / "passed-1").exists()
    assert not (tmp_path / "after-0").exists()
    assert code == 7
    assert "error: trainer.devices: another process died or hangs (no process advanced for 0.8 s)" in errors


#: the files that a trainer's file is composed with
BASES = {"ddp": ("auto", "gpu"), "slurm": ("auto", "gpu", "ddp")}


def composed(trainer: str, **changes: object) -> DictConfig:
    files = [
        loading.folder() / "trainer" / f"{name}.yaml" for name in dict.fromkeys((*BASES.get(trainer, ()), trainer))
    ]
    cfg = OmegaConf.create({"device": "auto", "trainer": OmegaConf.merge(*map(OmegaConf.load, files))})
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    assert isinstance(cfg, DictConfig)
    return cfg


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def test_a_request_is_taken_out_of_the_configuration(monkeypatch: pytest.MonkeyPatch):
    plain = OmegaConf.create({"device": "cpu"})
    assert rank_request.take_request(plain) is None
    cfg = composed("ddp", trainer__accelerator="cpu", trainer__devices=3, trainer__strategy__timeout_s=30)
    assert rank_request.take_request(cfg) == RankRequest(3, 30.0)
    assert "trainer" not in cfg
    assert cfg.device == "cpu"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rank_request.take_request(plain) == RankRequest(0)
    assert rank_request.take_request(composed("ddp", trainer__accelerator="cpu")) == RankRequest(0)


def test_a_step_of_one_task_and_a_batch_script_are_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the job: a batch script runs once
    assert rank_request.take_request(OmegaConf.create({"device": "cpu"})) is None
    with pytest.raises(ConfigError, match="srun did not start this process; start it as srun python analyze.py"):
        rank_request.take_request(composed("slurm"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert rank_request.take_request(composed("slurm")) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert rank_request.take_request(composed("slurm")) == RankRequest(0, 600.0)


@pytest.mark.parametrize(
    ("cfg", "overrides", "text"),
    [
        (composed("auto"), (), "trainer: an analysis takes trainer=ddp or trainer=slurm alone; .* device=cuda says where"),
        (composed("ddp"), ("trainer.max_epochs=3",), "trainer.max_epochs=3: a setting of a training"),
        (composed("ddp", trainer__accelerator="cpu"), (), "trainer.devices=auto: a CPU has no number of devices; set trainer"),
        (composed("ddp", trainer__accelerator="cpu", trainer__devices=0), (), "trainer.devices=0: not a number of processes"),
        (composed("ddp", trainer__num_nodes=2), (), "trainer.num_nodes=2: analyze.py starts processes on one machine"),
        (composed("ddp", trainer__accelerator="cpu", device="cuda"), (), "device=cuda: trainer.accelerator=cpu asks for"),
        (composed("ddp", trainer__strategy__timeout_s=0), (), "trainer.strategy.timeout_s=0: not a positive number"),
    ],
)  # fmt: skip
def test_refusals(cfg: DictConfig, overrides: tuple[str, ...], text: str):
    with pytest.raises(ConfigError, match=text):
        rank_request.take_request(cfg, overrides)


def test_another_number_of_processes_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="trainer.devices=2: 4 processes were started; set trainer.devices=4"):
        rank_request.take_request(composed("ddp", trainer__devices=2))
    with pytest.raises(ConfigError, match="device=cuda:1: all processes would share one GPU; set device=cuda"):
        rank_request.take_request(OmegaConf.create({"device": "cuda:1"}))
