"""What a stop leaves to do before training goes on: a validation, or the end of an epoch.

Lightning's own progress counters lose both. Saved after an epoch's last batch they take the epoch for done, without its
validation and its hooks, and count one epoch too few from then on; saved within a validation they go on in its middle, with
metrics of the rest alone. So the counters are written as if no image had been validated yet, and the weights, which a
weight average swaps for its own during a validation, are swapped back before they are saved.
"""

from __future__ import annotations

from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loops.loop import _Loop

Pending = Literal["validation", "epoch end"]

#: a validation that has begun with no batch: Lightning then runs all of it
_NOT_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def leave(trainer: Trainer, checkpoint: dict[str, Any], over: bool) -> Pending | None:
    """Return what the moment of a save leaves to do, and write Lightning's counters in ``checkpoint`` so that it is done.

    Args:
        trainer: in a fit.
        checkpoint: what is about to be saved.
        over: whether the epoch's last batch is done.
    """
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    after_batch = batches.completed == batches.processed - 1  # in a hook after a batch
    if not (trainer.validating or after_batch):
        return None
    fetcher: Any = trainer.fit_loop._data_fetcher
    due = trainer.validating or loop._should_check_val_fx(fetcher)
    if not (due or over):
        return None
    state = checkpoint["loops"]["fit_loop"]
    for counters in (state["epoch_loop.batch_progress"]["total"], state["epoch_loop.batch_progress"]["current"]):
        counters["completed"] = counters["processed"]
    if due:
        counters = {"total": dict(_NOT_BEGUN), "current": dict(_NOT_BEGUN), "is_last_batch": False}
        state["epoch_loop.val_loop.batch_progress"] = counters
        return "validation"
    state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # what follows a batch where no validation does
    return "epoch end"


def take_up(trainer: Trainer, pending: str) -> None:
    """Before the first batch of a resumed training: let an epoch end that needs no further batch and no validation.

    Lightning waits for a validation there, which marking it as run prevents; and with ``max_steps`` it would end an epoch again
    that had ended before the stop.
    """
    loop = trainer.fit_loop
    if pending == "epoch end" or not trainer.enable_validation:
        loop.epoch_loop.val_loop._has_run = True
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        _Loop.restarting.fset(loop, False)  # pyright: ignore[reportOptionalCall]  of the class: the loop's own never lets go
        loop.reset_restart_stage()


def take_average(trainer: Trainer, pl_module: LightningModule) -> None:
    """Where no step was left to make, so that training never ended: put the average in the place of the trained weights.

    Lightning does so at the end of training, which a run that was stopped after its last epoch does not reach again.
    """
    for callback in getattr(trainer, "callbacks"):  # noqa: B009  declared at run time only
        if isinstance(callback, WeightAveraging):
            callback.on_train_end(trainer, pl_module)


def swap_back(trainer: Trainer, pl_module: LightningModule) -> None:
    """Within a validation that will not go on: put the trained weights back in the place of their average."""
    for callback in getattr(trainer, "callbacks"):  # noqa: B009  declared at run time only
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_end(trainer, pl_module)
