"""Lightning callback that writes checkpoints, also before a training stops on a signal."""

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
from vitscope.runtime.torch_internals import whole_tensor
from vitscope.runtime.value_ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from vitscope.training import resume_state
from vitscope.training.accumulation import is_accumulating
from vitscope.training.stop_callbacks import agreed_signal


class Checkpoints(Callback):
    """Writes ``init``, ``last``, ``best`` and selected epochs, and ``last`` before a training stops on a signal.

    Lightning's own callback needs two instances and metric names in paths for this, and takes NaN for the best value.

    Args:
        monitor: Validation metric; ``best`` is written when it improves: at the end of the epoch, and after a validation within
            one at once, since the weights at the epoch's end are others.
        mode: ``max`` or ``min``: whether a higher or a lower value is better.
        every_n_epochs: Number of epochs between two writings of ``last``.
        snapshots: Further epochs to write as ``epoch-0099.ckpt``, counted from 0; ``log`` for those that end 1, 2, 4, ...
            epochs of training and for the last one; None for none.
        warmup_epochs: Length of the warm-up in epochs; with ``snapshots``, the epoch that ends it is written too, where it is
            at least 1.
        warmup_steps: Length of the warm-up in optimizer steps, in place of ``warmup_epochs``.
        init: Whether to write the network before its first step.

    Raises:
        ValueError: An unknown ``mode`` or ``snapshots``.
    """

    def __init__(
        self,
        monitor: str = "val/accuracy",
        mode: str = "max",
        every_n_epochs: PositiveInt = 1,
        snapshots: Literal["log"] | Sequence[int] | None = None,
        warmup_epochs: NonNegativeFloat = 0.0,
        warmup_steps: NonNegativeInt | None = None,
        init: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Expected mode to be 'min' or 'max', received {mode!r}.")
        if isinstance(snapshots, str) and snapshots != "log":
            raise ValueError(f"Expected snapshots to be 'log', a list of epochs or None, received {snapshots!r}.")
        if snapshots is not None and any(not isinstance(s, str) and s < 0 for s in snapshots):
            raise ValueError(f"Expected epochs counted from 0 in snapshots, received {list(snapshots)!r}.")
        self.monitor, self.mode, self.every_n_epochs = monitor, mode, every_n_epochs
        self.snapshots, self.init = snapshots, init
        self.warmup_epochs, self.warmup_steps = warmup_epochs, warmup_steps
        self.best: float | None = None
        self._validated: float | None = None  # the monitored value of a validation within this epoch
        self._has_validated = False  # since this process began
        self.folder = Path("checkpoints")
        self._stop = 0
        self._epoch_unsaved = False  # between the end of an epoch whose last.ckpt is not due and the next one's start

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and that of a validation whose epoch has not ended."""
        return {"best": self.best, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value, and that of a validation whose epoch had not ended."""
        self.best, self._validated = state_dict["best"], state_dict.get("validated")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the network before its first step."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if self.init and trainer.global_step == 0:
            trainer.save_checkpoint(self.folder / "init.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last``, ``best`` and the epoch's own checkpoint, each where it is due.

        Raises:
            ConfigError: The monitored metric does not exist.
            NumericalError: The weights are not finite; those of the last checkpoint are.
        """
        _check_finite(pl_module)
        epoch = trainer.current_epoch
        improved, self._validated = self._improved(trainer.callback_metrics), None
        self._epoch_unsaved = True
        is_last_due = (epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop or _is_last_epoch(trainer)
        is_last_due = is_last_due or agreed_signal(pl_module) != 0
        is_due = {"last": is_last_due, "best": improved, f"epoch-{epoch:04d}": self._is_snapshot(epoch, trainer)}
        names = [f"{name}.ckpt" for name in is_due if is_due[name]]
        if names:  # written as one: a kill leaves all of them as they were, or all of them written
            trainer.save_checkpoint(self.folder / names[0], storage_options={"copies": names[1:]})
        self._epoch_unsaved = not is_last_due

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write ``last`` where a training stops in the diagnostics of an epoch at whose end it was not due."""
        if isinstance(exception, Interrupted) and self._epoch_unsaved:
            self._save_last(trainer, pl_module)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Note that the epoch before is part of the next ``last``."""
        self._epoch_unsaved = False

    def _save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_finite(pl_module)  # the weights of the last checkpoint are not replaced by ones that are not
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._epoch_unsaved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write ``last`` where a signal asked to stop, on all ranks at the same step; the stop follows once the step is logged.

        A checkpoint holds no accumulated gradients, so the stop waits for the optimizer's step. After the last of
        ``max_steps`` a resumed run would have no step to make, so validation, test and diagnostics are finished first.
        """
        self._stop = 0 if _must_stop_later(trainer) else agreed_signal(pl_module)
        if self._stop:
            self._save_last(trainer, pl_module)

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop if the last step was saved; it is logged by now."""
        self._raise_if_saved()

    def on_validation_start(self, *_: Any) -> None:
        """Stop before a validation if the last step was saved."""
        self._raise_if_saved()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write ``last`` and stop where a signal asked to, during a validation."""
        is_fitting = trainer.state.fn == "fit"
        self._stop = 0 if is_fitting and _must_stop_later(trainer) else agreed_signal(pl_module)
        if self._stop and is_fitting:
            resume_state.restore_trained_weights(trainer, pl_module)
            self._save_last(trainer, pl_module)
        self._raise_if_saved()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the monitored value until the epoch's end, also across an interruption; write ``best`` within an epoch."""
        self._has_validated = True
        if self.monitor not in trainer.callback_metrics:
            return
        self._validated = float(trainer.callback_metrics[self.monitor])
        is_within_epoch = trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches
        if trainer.state.fn == "fit" and is_within_epoch and self._improved(trainer.callback_metrics):
            _check_finite(pl_module)
            trainer.save_checkpoint(self.folder / "best.ckpt")

    def _raise_if_saved(self) -> None:
        if self._stop:
            raise Interrupted(self._stop)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Stop during the test; the training was saved before."""
        stop_flag.check()

    def _improved(self, metrics: Mapping[str, Tensor]) -> bool:
        if self.monitor in metrics:
            value = float(metrics[self.monitor])
        elif self._has_validated and any(name.startswith("val/") for name in metrics):
            names = ", ".join(sorted(metrics))
            raise ConfigError("callbacks.checkpoint.monitor", self.monitor, "no such metric", f"choose from {names}")
        else:  # no validation since this process began
            value = math.nan if self._validated is None else self._validated
        if not math.isfinite(value):
            return False
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better:
            self.best = value
        return better

    def _is_snapshot(self, epoch: int, trainer: Trainer) -> bool:
        """Tell whether an epoch is written under its own name."""
        if self.snapshots is None:
            return False
        warmup_epochs = self._warmup_epochs(trainer)
        if warmup_epochs >= 1 and epoch == round(warmup_epochs) - 1:
            return True
        if isinstance(self.snapshots, str):  # log: after 1, 2, 4, ... epochs, and the last
            return (epoch + 1) & epoch == 0 or trainer.should_stop or _is_last_epoch(trainer)
        return epoch in self.snapshots

    def _warmup_epochs(self, trainer: Trainer) -> float:
        """Return the length of the warm-up in epochs."""
        if self.warmup_steps is None:
            return self.warmup_epochs
        steps_per_epoch = max(1, -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
        return self.warmup_steps / steps_per_epoch


def _must_stop_later(trainer: Trainer) -> bool:
    """Tell whether a stop has to wait: gradients are being accumulated, or the last step is made."""
    return is_accumulating(trainer) or 0 < trainer.max_steps <= trainer.global_step


def _is_last_epoch(trainer: Trainer) -> bool:
    """Tell whether the epoch that ends is the last."""
    return trainer.current_epoch + 1 == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step


def _check_finite(pl_module: pl.LightningModule) -> None:
    """Raise NumericalError where a parameter is not finite."""
    for name, p in pl_module.named_parameters():
        if not bool(torch.isfinite(whole_tensor(p)).all()):
            raise NumericalError(
                "optimizer.lr", None, f"{name} is not finite", "lower it; the last checkpoint is finite"
            )
