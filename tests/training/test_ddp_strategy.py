"""Two processes over gloo: the numbers of one process, and an end for all where one dies, hangs or raises."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

import vitscope as vs
from tests.fixtures.programs.processes import ENVIRONMENT, PATIENCE, ROOT, on_ranks, run_of, train_in_fork, wait_until
from vitscope.cli import exit_codes, train
from vitscope.config import factories
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io

SMALL = ["model=vit", "model.depth=1", "model.patch_size=8", "data.eval_batch_size=100", "logger=none",
         "trainer.log_every_n_steps=1",
         "trainer.limit_train_batches=4", "trainer.max_epochs=2"]  # fmt: skip
PAIR = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def numbers(run: Path) -> dict[tuple[int, str], float]:
    """Return every logged metric by step and name; what depends on the clock is not among them."""
    return {
        (row["step"], key): value
        for row in metrics_log.read(run / "metrics.jsonl")
        for key, value in row.items()
        if key.partition("/")[0] in ("train", "val", "test", "fourier")
    }


# Lightning on one device, in this process
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*GPU available but not used.*", "ignore:.*many workers.*",
                            "ignore:.*smaller than the logging interval.*")  # fmt: skip
def test_two_processes_give_one_process_s_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same global batch in float64: losses, gradient norms, metrics over uneven shares (512 images by 100), diagnostics."""
    shared = [*SMALL, "trainer.precision=64-true", "analysis=[fourier]", "analysis.fourier.probe.n_images=24",
              "analysis.fourier.probe.batch_size=8", "trainer.limit_test_batches=3"]  # fmt: skip
    process = train_in_fork([*shared, *PAIR, "data.batch_size=4", f"run_dir={tmp_path}/two"], tmp_path / "errors.txt")
    arguments = ["train.py", *shared, "trainer=cpu", "data.batch_size=8", f"run_dir={tmp_path}/one"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)
    assert exit_codes.run_command(train._command) == 0
    code, errors = process.wait(180)
    assert code == 0, errors
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {key for _, key in one} >= {
        "train/loss",
        "train/grad_norm",
        "val/accuracy",
        "val/ece",
        "fourier/high_frequency_last",
    }
    for key, value in one.items():
        if not key[1].startswith("test/"):  # three batches of the test split are other images on two ranks
            # sums in another order: torchmetrics keeps some of them in single precision
            assert two[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key


def train_as_rank(rank: int, arguments: list[str], port: int) -> None:
    """Train as one of two ranks that were started from outside, in a forked process."""
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ.pop("VITSCOPE_RUN_DIR", None)
    sys.argv = ["train.py", *arguments]
    assert exit_codes.run_command(train._command) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_average_weights_with_mixed_batches(tmp_path: Path) -> None:
    """The average of a module whose batches the data module mixes; it is what is tested and saved."""
    shared = [*SMALL, *PAIR, "objective=strong", "callbacks=[checkpoint,ema]", "callbacks.ema.decay=0.5", "data.batch_size=4",
              "trainer.max_epochs=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "analysis=[]"]  # fmt: skip
    on_ranks(train_as_rank, [*shared, f"run_dir={tmp_path}/two"], free_port())
    content = checkpoint_io.read(tmp_path / "two" / "checkpoints" / "last.ckpt")
    assert content["averaging_state"]["n_averaged"] == 4
    average, last = content["state_dict"], content["current_model_state"]
    assert average.keys() == last.keys()
    assert any(not torch.equal(average[name], last[name]) for name in average)
    assert "test/nll" in metrics_log.last_values(tmp_path / "two" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "precision", "tolerance"), [("ddp", "64-true", 1e-9), ("fsdp", "32-true", 1e-5)])
def test_each_process_normalizes_by_the_batch_statistics_of_its_own_images(
    trainer: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    """The documented exception: the first loss is the mean over both shares, each under its own statistics of BatchNorm.

    Running statistics are those of the first process, also in an analysis that follows a step. Tolerances are those of sums in
    another order in float64 and in float32.
    """
    arguments = ["model=convnet", *PAIR[1:], f"trainer={trainer}", f"trainer.precision={precision}", "data.batch_size=4",
                 "trainer.max_steps=1", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0", "test=false",
                 "analysis=[evaluation]", "analysis.evaluation.probe.n_images=16", "analysis.evaluation.probe.batch_size=4",
                 "logger=none", "callbacks.checkpoint.init=true", "data.image_size=16"]  # fmt: skip
    code, errors = train_in_fork([*arguments, f"run_dir={tmp_path}/two"], tmp_path / "errors.txt").wait(180)
    assert code == 0, errors

    cfg = OmegaConf.load(tmp_path / "two" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    initial = checkpoint_io.read(tmp_path / "two" / "checkpoints" / "init.ckpt")["state_dict"]
    dtype = torch.float64 if precision == "64-true" else torch.float32
    network = factories.model(cfg).to(dtype).train()
    weights = {name.removeprefix("model."): value for name, value in initial.items() if name.startswith("model.")}
    cfg.data.batch_size = 8
    data = factories.data(cfg)
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    logged = next(
        row["train/loss"] for row in metrics_log.read(tmp_path / "two" / "metrics.jsonl") if "train/loss" in row
    )

    def loss(rows: slice) -> float:
        network.load_state_dict(weights)
        with torch.no_grad():
            return float(F.cross_entropy(network(x[rows].to(dtype)), y[rows]))

    shares = [loss(slice(1, None, 2)), loss(slice(0, None, 2))]
    assert logged == pytest.approx(sum(shares) / 2, rel=tolerance)
    running = {  # of the share of rank 0, the last that was evaluated
        name: value.clone() for name, value in network.state_dict().items() if "running_" in name
    }
    last = checkpoint_io.read(tmp_path / "two" / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in running.items():
        torch.testing.assert_close(last[f"model.{name}"], value, rtol=tolerance, atol=tolerance)
    assert abs(loss(slice(None)) - logged) > 1e-3 * logged  # one process with the same global batch
    probe = vs.load_probe(tmp_path / "two", split="test", n_images=16, batch_size=4)
    (result,) = vs.load_results(tmp_path / "two")["evaluation"].values()
    # of a checkpoint read in float32
    assert result.nll == pytest.approx(vs.evaluation(vs.Probe(probe.model.to(dtype), probe.batches)).nll, rel=1e-5)


def test_synchronized_batch_statistics_are_refused_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", *SMALL, *PAIR, "trainer.sync_batchnorm=true", f"paths.runs={tmp_path}"]
    )
    assert exit_codes.run_command(train._command) == 2
    assert "error: trainer.sync_batchnorm=True: torch's SyncBatchNorm needs CUDA GPUs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517")])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_all_end_where_one_dies_or_hangs(tmp_path: Path, what: int, launcher: tuple[str, ...]) -> None:
    longer = ["trainer.max_epochs=100000", "data.batch_size=4", "analysis=[]", "trainer.strategy.timeout_s=30"]
    process = start(*SMALL, *longer, *PAIR, f"paths.runs={tmp_path}/runs", launcher=launcher)
    run_of(tmp_path / "runs")
    ranks = processes_of(str(tmp_path))
    os.kill(max(ranks), what)
    _, err = process.communicate(timeout=PATIENCE)  # it ends by itself: the training would take much longer
    if not launcher:  # torchrun has an exit code of its own
        assert process.returncode == 7, err
        assert "error: trainer.devices" in err
    assert process.returncode != 0
    wait_until(lambda: not processes_of(str(tmp_path)), "end of all processes")


@pytest.mark.slow
def test_all_end_where_one_raises(tmp_path: Path) -> None:
    """A rate at which the loss becomes infinite: whichever rank sees it first, all end with the numerical exit code."""
    process = start(*SMALL, *PAIR, "optimizer=sgd", "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "data.batch_size=4",
                    "analysis=[]", "trainer.strategy.timeout_s=30", f"paths.runs={tmp_path}/runs")  # fmt: skip
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (5, 7), err
    assert "Traceback" not in err
    wait_until(lambda: not processes_of(str(tmp_path)), "end of all processes")


def processes_of(text: str) -> list[int]:
    """Return the ids of Python processes whose command line has ``text``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command and "train.py" in command and "torch.distributed.run" not in command:
            found.append(int(folder.name))
    return found
