"""Lightning callback that writes checkpoints and saves before a stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, NumericalError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.training import resume_state
from vitscope.training.stop_callbacks import _agreed_signal


class Checkpoints(Callback):
    """Writes ``init``, ``last``, ``best`` and chosen epochs, and saves before a stop.

    Lightning's own callback needs two instances and metric names in paths for this, and takes NaN for the best value.

    Args:
        monitor: a validation metric; ``best`` is written when it improves.
        mode: ``max`` or ``min``.
        every_n_epochs: how often ``last`` is written.
        snapshots: further epochs to keep as ``epoch-0099.ckpt`` (counted from 0); ``log`` keeps those that end 1, 2, 4, ...
            epochs of training and the last, None none.
        warmup_epochs: also keep the epoch that ends the warm-up (with ``snapshots`` only), where it lasts one at least.
        init: keep the network before its first step.
    """

    def __init__(
        self,
        monitor: str = "val/accuracy",
        mode: str = "max",
        every_n_epochs: int = 1,
        snapshots: Literal["log"] | Sequence[int] | None = None,
        warmup_epochs: float = 0.0,
        init: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Expected mode to be 'min' or 'max', received {mode!r}.")
        if isinstance(snapshots, str) and snapshots != "log":
            raise ValueError(f"Expected snapshots to be 'log', a list of epochs or None, received {snapshots!r}.")
        if snapshots is not None and any(not isinstance(s, str) and s < 0 for s in snapshots):
            raise ValueError(f"Expected epochs counted from 0 in snapshots, received {list(snapshots)!r}.")
        self.monitor, self.mode, self.every_n_epochs = monitor, mode, every_n_epochs
        self.snapshots, self.warmup_epochs, self.init = snapshots, warmup_epochs, init
        self.best: float | None = None
        self._validated: float | None = None  # the monitored value of a validation within this epoch
        self.folder = Path("checkpoints")
        self._stop = 0
        self._epoch_unsaved = False  # between the end of an epoch whose last.ckpt is not due and the next one's start

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and that of a validation whose epoch has not ended."""
        return {"best": self.best, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best, self._validated = state_dict["best"], state_dict.get("validated")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the network before its first step."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if self.init and trainer.global_step == 0:
            trainer.save_checkpoint(self.folder / "init.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what this epoch is worth.

        Raises:
            ConfigError: the monitored metric does not exist.
            NumericalError: the weights are not finite; the last checkpoint still is.
        """
        _check_finite(pl_module)
        epoch = trainer.current_epoch
        improved, self._validated = self._improved(trainer.callback_metrics), None
        self._epoch_unsaved = True
        due = (epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop or _over(trainer)
        due = due or _agreed_signal(pl_module) != 0
        wanted = {"last": due, "best": improved, f"epoch-{epoch:04d}": self._kept(epoch, trainer)}
        names = [f"{name}.ckpt" for name, is_wanted in wanted.items() if is_wanted]
        if names:  # of one event: a kill leaves all of them as they were, or all of them written
            trainer.save_checkpoint(self.folder / names[0], storage_options={"copies": names[1:]})
        self._epoch_unsaved = not due

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save an epoch whose ``last.ckpt`` was not due where a stop comes in its diagnostics: nothing of it would be left."""
        if isinstance(exception, Interrupted) and self._epoch_unsaved:
            self._save_last(trainer)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Leave the epoch before to the next ``last.ckpt``."""
        self._epoch_unsaved = False

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._epoch_unsaved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save where a signal asked to stop, on all ranks at the same step; the stop itself waits for the step's row.

        Gradients that are being accumulated would be lost, so the stop waits for the optimizer's step; after the last of
        ``max_steps`` nothing would go on, so what is left is finished.
        """
        self._stop = 0 if _must_go_on(trainer) else _agreed_signal(pl_module)
        if self._stop:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop after a step that was saved and logged."""
        self._raise_if_saved()

    def on_validation_start(self, *_: Any) -> None:
        """Stop before a validation, likewise."""
        self._raise_if_saved()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save and stop during validation too."""
        fits = trainer.state.fn == "fit"
        self._stop = 0 if fits and _must_go_on(trainer) else _agreed_signal(pl_module)
        if self._stop and fits:
            resume_state.swap_back(trainer, pl_module)
            trainer.save_checkpoint(self.folder / "last.ckpt")
        self._raise_if_saved()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitored value until the epoch's end, over a stop in between."""
        if self.monitor in trainer.callback_metrics:
            self._validated = float(trainer.callback_metrics[self.monitor])

    def _raise_if_saved(self) -> None:
        if self._stop:
            raise Interrupted(self._stop)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Stop during the test; training was saved before."""
        stop_flag.check()

    def _improved(self, metrics: Mapping[str, Tensor]) -> bool:
        if self.monitor in metrics:
            value = float(metrics[self.monitor])
        elif any(name.startswith("val/") for name in metrics):
            known = ", ".join(sorted(metrics))
            raise ConfigError("callbacks.checkpoint.monitor", self.monitor, "no such metric", f"choose from {known}")
        else:  # no validation since this process began
            value = math.nan if self._validated is None else self._validated
        if not math.isfinite(value):
            return False
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better:
            self.best = value
        return better

    def _kept(self, epoch: int, trainer: Trainer) -> bool:
        """Whether the schedule keeps this epoch under its own name."""
        if self.snapshots is None:
            return False
        if self.warmup_epochs >= 1 and epoch == round(self.warmup_epochs) - 1:
            return True
        if isinstance(self.snapshots, str):  # log: after 1, 2, 4, ... epochs, and the last
            return (epoch + 1) & epoch == 0 or epoch + 1 == trainer.max_epochs
        return epoch in self.snapshots


def _must_go_on(trainer: Trainer) -> bool:
    """Whether a stop has to wait: gradients are being accumulated, or no step is left to go on with."""
    return trainer.fit_loop.epoch_loop._should_accumulate() or 0 < trainer.max_steps <= trainer.global_step


def _over(trainer: Trainer) -> bool:
    """Whether the epoch that ends is the last."""
    return trainer.current_epoch + 1 == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step


def _check_finite(pl_module: pl.LightningModule) -> None:
    for name, p in pl_module.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise NumericalError(
                "optimizer.lr", None, f"{name} is not finite", "lower it; the last checkpoint is finite"
            )
