"""Needs of PyTorch Lightning beyond its documented interface: `vitscope.training.lightning_internals`.

Each test names one need. A failure after an upgrade means that the function it names has to be changed for the new release.
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitscope.config import instantiate
from vitscope.training import lightning_internals as internals
from vitscope.training.accumulation import is_accumulating

N_BATCHES = 3


class Regression(pl.LightningModule):
    """A linear model of one input; three batches an epoch and two of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(N_BATCHES, 1)))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(2, 1)))


def trainer_of(folder: Path, **options: Any) -> pl.Trainer:
    limits = {"max_epochs": 2} if "max_steps" not in options else {}
    return pl.Trainer(
        **{**limits, **options},
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


class Observer(pl.Callback):
    """Records what the internals tell in each hook."""

    def __init__(self) -> None:
        self.in_batch_end: dict[str, set[bool]] = {}
        self.validation_due: list[bool] = []
        self.accumulating: list[tuple[bool, bool]] = []
        self.steps: list[tuple[int, int]] = []

    def _see(self, hook: str, trainer: pl.Trainer) -> None:
        self.in_batch_end.setdefault(hook, set()).add(internals.is_in_batch_end_hook(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._see("train batch end", trainer)
        self.validation_due.append(internals.is_validation_due(trainer))
        self.accumulating.append((is_accumulating(trainer), trainer.fit_loop._should_accumulate()))

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._see("validation", trainer)
        self.accumulating.append((is_accumulating(trainer), trainer.fit_loop._should_accumulate()))

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._see("epoch end", trainer)
        self.steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loops_tell_where_training_is(tmp_path: Path, accumulate: int) -> None:
    observer = Observer()
    trainer = trainer_of(tmp_path, callbacks=[observer], accumulate_grad_batches=accumulate)
    trainer.fit(Regression())
    assert observer.in_batch_end == {"train batch end": {True}, "validation": {False}, "epoch end": {False}}
    assert observer.validation_due == [False, False, True] * 2
    assert all(own == lightning for own, lightning in observer.accumulating)
    assert {own for own, _ in observer.accumulating} == ({False} if accumulate == 1 else {False, True})
    assert all(
        steps == logged for steps, logged in observer.steps
    )  # metrics of an epoch's end are logged at global_step - 1


class SaveAfter(pl.Callback):
    """Writes a checkpoint in the hook after a number of batches, with the counters that a function corrects."""

    def __init__(self, n_batches: int, path: Path) -> None:
        self.n_batches, self.path = n_batches, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.n_batches:
            trainer.save_checkpoint(self.path)


def saved_after(n_batches: int, folder: Path, **options: Any) -> dict[str, Any]:
    path = folder / "a.ckpt"
    trainer_of(folder, callbacks=[SaveAfter(n_batches, path)], **options).fit(Regression())
    return torch.load(path, weights_only=True)


def resumed(
    checkpoint: dict[str, Any], folder: Path, *callbacks: pl.Callback, **options: Any
) -> tuple[Regression, pl.Trainer]:
    path, module = folder / "b.ckpt", Regression()
    torch.save(checkpoint, path)
    trainer = trainer_of(folder, callbacks=list(callbacks), **options)
    trainer.fit(module, ckpt_path=path, weights_only=True)
    return module, trainer


def test_checkpoints_hold_the_counters_that_are_corrected(tmp_path: Path) -> None:
    checkpoint = saved_after(N_BATCHES, tmp_path)
    loops = checkpoint["loops"]["fit_loop"]
    assert {"total", "current", "is_last_batch"} <= set(loops["epoch_loop.batch_progress"])
    assert set(loops["epoch_loop.val_loop.batch_progress"]["total"]) == {"ready", "started", "processed", "completed"}
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == N_BATCHES - 1
    corrected = copy.deepcopy(checkpoint)
    internals.mark_batch_completed(corrected)
    internals.mark_validation_begun(corrected)
    internals.count_last_step(corrected)
    loops = corrected["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] == N_BATCHES
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == N_BATCHES


def test_a_validation_marked_as_begun_is_made_on_resume(tmp_path: Path) -> None:
    checkpoint = saved_after(N_BATCHES, tmp_path)
    internals.mark_batch_completed(checkpoint)
    internals.mark_validation_begun(checkpoint)
    module, trainer = resumed(checkpoint, tmp_path)
    assert module.validated == [0, 1, 0, 1]  # of the epoch that was interrupted and of the next one
    assert (trainer.current_epoch, trainer.global_step) == (2, 2 * N_BATCHES)


class MarkValidationDone(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        internals.mark_validation_done(trainer)


def test_an_epoch_without_validation_ends_on_resume(tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "max_epochs": 1}
    checkpoint = saved_after(N_BATCHES, tmp_path, **options)
    internals.mark_batch_completed(checkpoint)
    internals.count_last_step(checkpoint)
    observer = Observer()
    _, trainer = resumed(checkpoint, tmp_path, MarkValidationDone(), observer, **options)
    assert observer.steps == [(N_BATCHES, N_BATCHES)]  # the epoch's end, without a further batch
    assert (trainer.current_epoch, trainer.global_step) == (1, N_BATCHES)


class EndRestart(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        internals.end_restart_of_batches(trainer)


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 3 * N_BATCHES}])
def test_the_epochs_after_one_that_only_ended_are_trained(limits: dict[str, int], tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, **limits}
    checkpoint = saved_after(N_BATCHES, tmp_path, **options)
    internals.mark_batch_completed(checkpoint)
    internals.count_last_step(checkpoint)
    _, trainer = resumed(checkpoint, tmp_path, MarkValidationDone(), EndRestart(), **options)
    assert trainer.global_step == 3 * N_BATCHES


class SaveAtEpochEnd(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class CompleteRestartedEpoch(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        internals.complete_restarted_epoch(trainer)


def test_an_epoch_that_had_ended_does_not_end_again_with_max_steps(tmp_path: Path) -> None:
    path, options = tmp_path / "a.ckpt", {"max_steps": 2 * N_BATCHES}
    trainer_of(tmp_path, callbacks=[SaveAtEpochEnd(path)], **options).fit(Regression())
    observer = Observer()
    resumed(torch.load(path, weights_only=True), tmp_path, CompleteRestartedEpoch(), observer, **options)
    assert [steps for steps, _ in observer.steps] == [2 * N_BATCHES]


def test_the_training_data_can_be_loaded_before_the_first_epoch(tmp_path: Path) -> None:
    seen: list[float] = []

    class Early(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            seen.append(self.trainer.num_training_batches)
            internals.load_training_data(self.trainer)
            seen.append(self.trainer.num_training_batches)
            return super().configure_optimizers()

    trainer_of(tmp_path, max_steps=2).fit(Early())
    assert seen == [float("inf"), N_BATCHES]


class SignalHandler(pl.Callback):
    def __init__(self) -> None:
        self.handler: Any = None

    def on_train_batch_end(self, *_: Any) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


def test_a_fit_keeps_the_process_s_signal_handlers(tmp_path: Path) -> None:
    def handler(*_: Any) -> None: ...

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        callback = SignalHandler()
        trainer = trainer_of(tmp_path, max_steps=1, callbacks=[callback])
        internals.keep_signal_handlers(trainer)
        trainer.fit(Regression())
        assert callback.handler is handler
        assert signal.getsignal(signal.SIGTERM) is handler
        replaced = SignalHandler()
        trainer_of(tmp_path, max_steps=1, callbacks=[replaced]).fit(Regression())
        assert replaced.handler is not handler, "Lightning installs no handler any more: remove keep_signal_handlers"
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_launcher_of_other_ranks_lists_its_processes(tmp_path: Path) -> None:
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    trainer = trainer_of(tmp_path)
    assert trainer.strategy.launcher is None
    assert internals.child_processes(trainer) == []
    assert _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1).procs == []


def test_a_wrong_option_of_the_trainer_is_recognized_as_one() -> None:
    with pytest.raises(Exception, match="max_epochs") as error:
        pl.Trainer(max_epochs=-2, accelerator="cpu", logger=False)
    assert instantiate.refused(error.value)
