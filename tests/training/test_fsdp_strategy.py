"""Training with weights sharded over two processes on gloo: DDP's numbers, resuming, and analyses of the sharded network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vitscope as vs
from tests.fixtures.configs.configurations import composed
from tests.fixtures.programs.processes import train_in_fork
from vitscope.config import cross_checks, loading
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runtime.errors import ConfigError

SMALL = ["model=vit", "model.depth=1", "model.patch_size=8", "data.eval_batch_size=100", "logger=none",
         "trainer.log_every_n_steps=1", "trainer.limit_train_batches=3", "trainer.max_epochs=2", "test=false",
         "trainer.limit_val_batches=1", "data.batch_size=4", "trainer.accelerator=cpu", "trainer.devices=2",
         "trainer.precision=32-true", "callbacks.checkpoint.snapshots=[0]"]  # fmt: skip
HESSIAN = ["analysis=[hessian_eigenvalues]", "analysis.hessian_eigenvalues.probe.n_images=16",
           "analysis.hessian_eigenvalues.probe.batch_size=8", "analysis.hessian_eigenvalues.k=1"]  # fmt: skip


def trained(folder: Path, *arguments: str) -> Path:
    process = train_in_fork([*SMALL, f"run_dir={folder}", *arguments], folder.with_suffix(".txt"))
    code, errors = process.wait(240)
    assert code == 0, errors
    return folder


def numbers(run: Path) -> dict[tuple[int, str], float]:
    return {
        (row["step"], key): value
        for row in metrics_log.read(run / "metrics.jsonl")
        for key, value in row.items()
        if key.startswith(("train/", "val/", "hessian_eigenvalues/eigenvalue"))
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint_io.read(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.precision=64-true"],
            "trainer.precision=64-true: trainer=fsdp does not take it; use 32-true, bf16-mixed",
        ),
        (["optimizer=sam"], "optimizer=vitscope.training.sam.SAM: it reads whole weights"),
        (["optimizer=muon"], "optimizer=vitscope.training.optimizers.muon.MuonAdamW: it reads whole weights"),
        (["compile=true"], "compile=True: trainer=fsdp trains the network as it is"),
        (["callbacks=[checkpoint,ema]"], "callbacks.ema=.*: it averages whole weights"),
    ],
)
def test_what_needs_whole_weights_is_refused(overrides: list[str], message: str) -> None:
    cfg = composed("train", "trainer=fsdp", "trainer.accelerator=cpu", *overrides)
    with pytest.raises(ConfigError, match=message):
        cross_checks.check(loading.plain(cfg))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Lightning observes real processes
def test_sharded_training_is_ddp_s_and_is_resumed_and_analyzed(tmp_path: Path) -> None:
    sharded = trained(tmp_path / "fsdp", "trainer=fsdp", *HESSIAN)
    replicated = trained(tmp_path / "ddp", "trainer=ddp", *HESSIAN)
    expected, received = numbers(replicated), numbers(sharded)
    assert received.keys() == expected.keys()
    assert any(key.startswith("hessian") for _, key in received)
    for key, value in expected.items():
        # float32: sums in another order, which AdamW's first steps divide by gradients near zero
        assert received[key] == pytest.approx(value, rel=2e-3, abs=1e-4), key

    # whole checkpoints: every process of any trainer reads them
    network = vs.load_probe(sharded, split="train").model
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in weights(sharded).values())

    start = sharded / "checkpoints" / "epoch-0000.ckpt"
    resumed = trained(tmp_path / "resumed", "trainer=fsdp", "analysis=[]", f"ckpt_path={start}")
    assert json.loads((resumed / "provenance.json").read_text())["status"] == "finished"
    for name, tensor in weights(sharded).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    continued = trained(tmp_path / "continued", "trainer=ddp", "analysis=[]", f"ckpt_path={start}")
    for name, tensor in weights(sharded).items():
        torch.testing.assert_close(weights(continued)[name], tensor, rtol=0, atol=1e-4)
