"""Commands run in this process, on a tiny ViT, digits or photographs, and a few images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitscope.cli import analyze, exit_codes, train

TINY = [
    "model=vit",
    "model.depth=1",
    "model.patch_size=8",
    "logger=none",
    "data.batch_size=16",
    "data.eval_batch_size=64",
]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run ``train.py`` or ``analyze.py`` with arguments; return the exit code."""

    def run(command: str, *arguments: str) -> int:
        monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        return exit_codes.code_of({"train": train, "analyze": analyze}[command]._command)

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return overrides for a training of seconds."""
    limits = ["trainer.limit_train_batches=4", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    return [*TINY, *limits, "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", f"paths.runs={tmp_path}/runs"]
