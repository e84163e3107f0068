"""Lightning callbacks that end a training before its last epoch.

They do so on a signal, on a run folder that another process holds, on ranks with different configurations, and on the decision
of Lightning's early stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from vitscope.runs import run_lock
from vitscope.runs.run_dir import Run
from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.errors import DistributedError
from vitscope.runtime.stop_flag import Interrupted


class StopWithoutCheckpoint(Callback):
    """Stops a training that writes no checkpoints when a signal asks for it."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop after a step, the same one on all ranks."""
        if signum := agreed_signal(pl_module):
            raise Interrupted(signum)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop during a validation."""
        self.on_train_batch_end(trainer, pl_module)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Stop during the test."""
        stop_flag.check()


class RunFolderCheck(Callback):
    """Ends a training whose run folder was deleted or is held by another process, before anything more is written there."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_start(self, *_: Any) -> None:
        """Check before a step."""
        run_lock.check(self.run.path)

    def on_train_batch_end(self, *_: Any) -> None:
        """Check before a stop is saved."""
        run_lock.check(self.run.path)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Check before the epoch's checkpoints."""
        run_lock.check(self.run.path)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Check during a validation."""
        run_lock.check(self.run.path)

    def on_test_batch_end(self, *_: Any) -> None:
        """Check during the test."""
        run_lock.check(self.run.path)


class ConfigurationCheck(Callback):
    """Refuses ranks that composed different configurations, or resume at different steps, since they would average gradients."""

    def __init__(self, config_hash: str) -> None:
        self.config_hash = config_hash

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the ranks' hashes."""
        hashes = gather_objects(self.config_hash)
        deviating_rank = next((rank for rank, config_hash in enumerate(hashes) if config_hash != hashes[0]), None)
        if deviating_rank is not None:
            reason = f"rank {deviating_rank} composed another configuration than rank 0 ({hashes[deviating_rank]}, {hashes[0]})"
            raise DistributedError("trainer.devices", len(hashes), reason, "start every rank with the same overrides")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare where the checkpoints that the ranks have read stand: a machine may still see an older file."""
        steps = gather_objects(int(trainer.global_step))
        deviating_rank = next((rank for rank, step in enumerate(steps) if step != steps[0]), None)
        if deviating_rank is not None:
            reason = (
                f"rank {deviating_rank} resumes after step {steps[deviating_rank]} and rank 0 after step {steps[0]}"
            )
            raise DistributedError("ckpt_path", None, reason, "give every rank the same file")


class EarlyChecks(Callback):
    """Makes the checks of Lightning's early stopping before an epoch is saved; stands before the callback that saves.

    Lightning makes them after all other callbacks of an epoch's end, when ``last.ckpt`` is already written: a run resumed from
    there would never make that epoch's check, and a decision to stop would be lost.

    The callback also stores the monitored values, which Lightning does not: an epoch without a validation is checked by the
    value of the last one, in a resumed run as in an uninterrupted one.

    Args:
        stoppings: Callbacks whose checks are made here in place of where Lightning makes them.
    """

    def __init__(self, stoppings: Sequence[EarlyStopping]) -> None:
        self.stoppings = list(stoppings)
        self._checks: list[Callable[..., None]] = [stopping.on_train_epoch_end for stopping in stoppings]
        self._monitored: dict[str, float] = {}
        for stopping in self.stoppings:
            cast(Any, stopping).on_train_epoch_end = _check_nothing

    def state_dict(self) -> dict[str, Any]:
        """Return the monitored values of the last validation."""
        return {"monitored": dict(self._monitored)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the monitored values of the last validation."""
        self._monitored = dict(state_dict.get("monitored", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a resumed training that had already been stopped early before its checkpoint was written."""
        if any(stopping.stopping_reason != EarlyStoppingReason.NOT_STOPPED for stopping in self.stoppings):
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the monitored values of the last validation to the trainer."""
        for name, value in self._monitored.items():
            trainer.callback_metrics.setdefault(name, torch.tensor(value))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the monitored values, for a checkpoint that is written before the epoch's end."""
        self._store_monitored(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check whether the epoch that ends is the last."""
        self._store_monitored(trainer)
        for check in self._checks:
            check(trainer, pl_module)

    def _store_monitored(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        names = {str(stopping.monitor) for stopping in self.stoppings} & metrics.keys()
        self._monitored |= {name: float(metrics[name]) for name in names}


def _check_nothing(*_: Any) -> None:
    """Replace a check that `EarlyChecks` makes."""


def agreed_signal(pl_module: pl.LightningModule) -> int:
    """Return the signal that asked any rank to stop, the same number on all ranks; 0 for none."""
    signum = stop_flag.requested() or 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        highest = torch.tensor(signum, device=pl_module.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        signum = int(highest)
    return signum
