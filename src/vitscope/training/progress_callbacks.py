"""What a training says of itself: its accuracy at the end of an epoch, and plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class EpochAccuracy(Callback):
    """Logs ``train/accuracy`` when an epoch ends, before anything is saved, measured or stopped there.

    Lightning would log it after all callbacks: a checkpoint could not monitor it, and a stop in an epoch's last diagnostics would
    lose it.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row."""
        accuracy = pl_module.epoch_accuracy()  # pyright: ignore[reportCallIssue]
        if accuracy is None:
            return
        trainer.callback_metrics["train/accuracy"] = torch.tensor(accuracy)
        step = (
            trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        )  # the epoch's last, as in the row of its validation
        for logger in trainer.loggers:
            logger.log_metrics({"train/accuracy": accuracy, "epoch": trainer.current_epoch}, step=step)


class PlainProgress(Callback):
    """Progress of training where the output is no terminal: a line now and then, rank 0 only."""

    def __init__(self, interval_s: float = 15.0) -> None:
        self.interval_s = interval_s
        self._said = 0.0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = self._said = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Say where training stands."""
        now = time.monotonic()
        if trainer.is_global_zero and now - self._said >= self.interval_s:
            self._said = now
            self._say(trainer, now)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how the epoch ended."""
        if trainer.is_global_zero and time.monotonic() - self._said >= self.interval_s / 5:
            self._said = time.monotonic()
            self._say(trainer, self._said)

    def _say(self, trainer: Trainer, now: float) -> None:
        metrics = trainer.callback_metrics
        shown = [f"{key} {float(metrics[key]):.3f}" for key in ("train/loss", "val/accuracy") if key in metrics]
        total = int(trainer.estimated_stepping_batches)
        done = trainer.global_step
        left = (now - self._started) / max(done, 1) * (total - done)
        text = f"epoch {trainer.current_epoch}, step {done}/{total}, {', '.join(shown)}, {left:.0f} s left"
        print(text, file=sys.stderr, flush=True)
