"""Progress callbacks: training accuracy at the end of an epoch, and plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class EpochAccuracy(Callback):
    """Logs ``train/accuracy`` when an epoch ends, before anything is saved, measured or stopped there.

    Lightning would log it after all callbacks: a checkpoint could not monitor it, and it would be lost where a run is stopped
    in an epoch's last diagnostics.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of the metrics log, at the step of the epoch's last batch."""
        accuracy = cast(Any, pl_module).epoch_accuracy()
        if accuracy is None:
            return
        trainer.callback_metrics["train/accuracy"] = torch.tensor(accuracy)
        step = trainer.global_step - 1
        for logger in trainer.loggers:
            logger.log_metrics({"train/accuracy": accuracy, "epoch": trainer.current_epoch}, step=step)


class PlainProgress(Callback):
    """Prints a line of progress on stderr at intervals, on rank 0.

    Args:
        interval_s: Smallest number of seconds between two lines; at the end of an epoch a fifth of it.
    """

    def __init__(self, interval_s: float = 15.0) -> None:
        self.interval_s = interval_s
        self._last_line_time = 0.0
        self._start_time, self._start_step = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; steps that a resumed run made earlier took other time."""
        self._start_time = self._last_line_time = time.monotonic()
        self._start_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print a line if the interval is over."""
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last_line_time >= self.interval_s:
            self._last_line_time = now
            self._print_line(trainer, now)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the epoch."""
        if trainer.is_global_zero and time.monotonic() - self._last_line_time >= self.interval_s / 5:
            self._last_line_time = time.monotonic()
            self._print_line(trainer, self._last_line_time)

    def _print_line(self, trainer: Trainer, now: float) -> None:
        metrics = trainer.callback_metrics
        shown_metrics = [f"{key} {float(metrics[key]):.3f}" for key in ("train/loss", "val/accuracy") if key in metrics]
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        is_limited = total != float("inf")  # a training with max_time alone is not
        position = f"epoch {trainer.current_epoch}, step {step}" + (f"/{total}" if is_limited else "")
        parts = [position, *shown_metrics]
        if is_limited and step > self._start_step:
            seconds_left = (now - self._start_time) / (step - self._start_step) * (total - step)
            parts.append(f"{seconds_left:.0f} s left")
        print(", ".join(parts), file=sys.stderr, flush=True)
