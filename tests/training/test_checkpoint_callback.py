"""When checkpoints are written, and which weights they hold; whole trainings are in `tests/cli/test_resume.py`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, NumericalError
from vitscope.training.checkpoint_callback import Checkpoints


def pretended_trainer(batch: int, **metrics: float) -> Any:
    """Return a trainer of ten batches an epoch after one of them, which notes what it saves."""
    saved: list[str] = []

    def save_checkpoint(path: Path, storage_options: Any = None) -> None:
        saved.extend([path.name, *(storage_options or {}).get("copies", ())])

    return SimpleNamespace(
        fit_loop=SimpleNamespace(batch_idx=batch - 1), num_training_batches=10, accumulate_grad_batches=1,
        is_last_batch=batch == 10, callback_metrics={f"val/{name}": torch.tensor(value) for name, value in metrics.items()},
        state=SimpleNamespace(fn="fit"), should_stop=False, current_epoch=0, max_epochs=5, max_steps=-1, global_step=batch,
        callbacks=[], strategy=SimpleNamespace(handles_gradient_accumulation=False), save_checkpoint=save_checkpoint, saved=saved,
    )  # fmt: skip


def test_best_is_written_with_the_weights_that_were_validated() -> None:
    """A validation after batch 9 of 10 is not one of the weights at the epoch's end."""
    callback, network = Checkpoints(), nn.Linear(2, 2)
    within = pretended_trainer(9, accuracy=0.5)
    callback.on_validation_end(within, network)
    assert within.saved == ["best.ckpt"]
    end = pretended_trainer(10, accuracy=0.5)
    callback.on_train_epoch_end(end, network)
    assert end.saved == ["last.ckpt"]
    end = pretended_trainer(10, accuracy=0.75)
    callback.on_validation_end(end, network)
    assert end.saved == []
    callback.on_train_epoch_end(end, network)
    assert end.saved == ["last.ckpt", "best.ckpt"]


@pytest.mark.parametrize(
    ("end", "is_written"),
    [
        ({}, False),
        ({"max_epochs": 6}, True),
        ({"max_epochs": -1, "max_steps": 60}, True),
        ({"should_stop": True}, True),
    ],
)
def test_snapshots_of_log_hold_the_last_epoch_whatever_ends_the_training(end: dict[str, Any], is_written: bool) -> None:
    """The sixth epoch is no power of two; steps, a limit of time or early stopping may end the training with it."""
    trainer = pretended_trainer(10, accuracy=0.5)
    trainer.current_epoch, trainer.global_step, trainer.max_epochs = 5, 60, 100
    vars(trainer).update(end)
    Checkpoints(snapshots="log").on_train_epoch_end(trainer, nn.Linear(2, 2))
    assert ("epoch-0005.ckpt" in trainer.saved) is is_written


def test_a_metric_is_missing_only_after_a_validation() -> None:
    """A resumed run has the monitored values of its early stopping before its first validation, and no others."""
    callback, network = Checkpoints(), nn.Linear(2, 2)
    trainer = pretended_trainer(10, loss=1.0)
    callback.on_train_epoch_end(trainer, network)
    assert trainer.saved == ["last.ckpt"]
    callback.on_validation_end(trainer, network)
    with pytest.raises(
        ConfigError, match="callbacks.checkpoint.monitor=val/accuracy: no such metric; choose from val/loss"
    ):
        callback.on_train_epoch_end(trainer, network)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
def test_a_stop_does_not_replace_finite_weights(hook: str) -> None:
    network, trainer = nn.Linear(2, 2), pretended_trainer(5)
    with torch.no_grad():
        network.weight[0, 0] = float("nan")
    stop_flag.request(signal.SIGTERM)
    try:
        with pytest.raises(NumericalError, match="weight is not finite"):
            getattr(Checkpoints(), hook)(trainer, network)
    finally:
        stop_flag.clear()
    assert trainer.saved == []
