"""Lines of progress where the output is no terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vitscope.training.progress_callbacks import PlainProgress


def line_after_ten_steps(total: float, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that a run which goes on at step 900 prints after ten more steps, of a second each."""
    trainer: Any = SimpleNamespace(
        global_step=900, estimated_stepping_batches=total, current_epoch=3, callback_metrics={"train/loss": 0.5}
    )
    progress = PlainProgress()
    progress.on_train_start(trainer, None)
    trainer.global_step = 910
    progress._print_line(trainer, progress._start_time + 10)
    return capsys.readouterr().err.strip()


def test_the_time_left_follows_the_steps_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_after_ten_steps(1000, capsys) == "epoch 3, step 910/1000, train/loss 0.500, 90 s left"


def test_a_training_without_a_last_step_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """``trainer.max_epochs=-1`` with ``trainer.max_time``."""
    assert line_after_ten_steps(float("inf"), capsys) == "epoch 3, step 910, train/loss 0.500"
