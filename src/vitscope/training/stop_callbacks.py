"""Lightning callbacks that stop a training: on a signal, on a run folder that is not held any more, on ranks that disagree."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

from vitscope.runs import run_lock
from vitscope.runs.run_dir import Run
from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.errors import DistributedError
from vitscope.runtime.stop_flag import Interrupted


class StopsWithoutSaving(Callback):
    """Stops where a signal asks for it in a training that keeps no checkpoints."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop after a step, on all ranks at the same one."""
        if signum := _agreed_signal(pl_module):
            raise Interrupted(signum)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop during a validation."""
        self.on_train_batch_end(trainer, pl_module)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Stop during the test."""
        stop_flag.check()


class HeldFolder(Callback):
    """Ends a training whose run folder was deleted or taken over, before anything more is written there."""

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


class SameConfiguration(Callback):
    """Refuses ranks that composed different configurations: they would average gradients of different experiments."""

    def __init__(self, config_hash: str) -> None:
        self.config_hash = config_hash

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the ranks' hashes."""
        hashes = gather_objects(self.config_hash)
        other = next((rank for rank, found in enumerate(hashes) if found != hashes[0]), None)
        if other is not None:
            why = f"rank {other} composed another configuration than rank 0 ({hashes[other]}, {hashes[0]})"
            raise DistributedError("trainer.devices", len(hashes), why, "start every rank with the same overrides")


def _agreed_signal(pl_module: pl.LightningModule) -> int:
    signum = stop_flag.requested() or 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        agreed = torch.tensor(signum, device=pl_module.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        signum = int(agreed)
    return signum
