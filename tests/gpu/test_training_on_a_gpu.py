"""``train.py`` on a GPU: families, precisions, compilation, and what is refused there."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE, TRAINER, needs_a_gpu
from vitscope.cli import exit_codes, train
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io

# advice of Lightning and of torch's compiler is no subject here
pytestmark = [pytest.mark.gpu, needs_a_gpu, pytest.mark.filterwarnings("ignore")]

CASES = {
    "alternet with the default analyses": ["model=alternet"],
    "vit": ["model=vit"],
    "convnet": ["model=convnet"],
    "swin": ["model=swin"],
    "compile": ["model=vit", "model.depth=2", "compile=true", "analysis=[fourier]"],
    "channels_last": ["model=alternet", "channels_last=true", "analysis=[hessian]"],
    "deterministic": ["model=alternet", "trainer.deterministic=true", "analysis=[]"],
    "bf16-mixed": ["model=vit", "trainer.precision=bf16-mixed", "analysis=[hessian,landscape]"],
    "bf16-true": ["model=vit", "trainer.precision=bf16-true", "analysis=[hessian,landscape]"],
    "SAM": ["model=alternet", "optimizer=sam", "analysis=[]"],
    "Muon": ["model=vit", "optimizer=muon", "analysis=[]"],
    "weight average": ["model=alternet", "callbacks=[checkpoint,ema]", "analysis=[]"],
    "gradient checkpointing": ["model=alternet", "model.grad_checkpointing=true", "analysis=[hessian]"],
    "fused AdamW": ["model=alternet", "+optimizer.fused=true", "analysis=[]"],
    "DDP of one process": ["model=vit", "trainer=ddp", f"trainer.accelerator={TRAINER}", "trainer.devices=1",
                           "analysis=[fourier]"],
    "worker processes": ["model=convnet", "data.num_workers=2", "analysis=[]"],
    "strong augmentation": ["model=alternet", "objective=strong", "analysis=[hessian]"],
}  # fmt: skip
#: options that need CUDA, which a rehearsal leaves out
ON_CUDA = {"16-mixed": ["model=vit", "trainer.precision=16-mixed", "analysis=[]"]}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Return the exit code of a short training in ``folder``."""
    common = ["caps=smoke", "logger=none", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"]
    device = [] if any(argument.startswith("trainer=") for argument in arguments) else [f"trainer={TRAINER}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *device, *arguments, f"run_dir={folder}"])
    monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)
    return exit_codes.run_command(train._command)


def losses(folder: Path) -> list[float]:
    """Return the training loss of every step."""
    return [row["train/loss"] for row in metrics_log.read(folder / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("name", [*CASES, *(ON_CUDA if DEVICE.type == "cuda" else ())])
def test_a_training_ends_with_finite_numbers(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path / "run", *(CASES | ON_CUDA)[name]) == 0
    found = losses(tmp_path / "run")
    assert len(found) == 3
    assert all(math.isfinite(loss) for loss in found)


@pytest.mark.parametrize("model", ["vit", "convnet"])
def test_a_resumed_training_repeats_an_uninterrupted_one(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bit for bit with deterministic kernels, which sums of atomic operations are not."""
    shared = [f"model={model}", "analysis=[]", "trainer.deterministic=true", "caps=none", "trainer.limit_train_batches=3",
              "trainer.limit_val_batches=1", "test=false", "data.batch_size=8"]  # fmt: skip
    assert run(monkeypatch, tmp_path / "whole", *shared, "trainer.max_epochs=2") == 0
    assert run(monkeypatch, tmp_path / "parts", *shared, "trainer.max_epochs=1") == 0
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"run={tmp_path / 'parts'}", "ckpt_path=last", "trainer.max_epochs=2"]
    )
    assert exit_codes.run_command(train._command) == 0
    whole, parts = (
        checkpoint_io.read(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
