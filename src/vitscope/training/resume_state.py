"""Correct Lightning's loop state in checkpoints that are written after an epoch's last batch or during a validation.

Lightning's counters lose what was left to do at such a checkpoint. After an epoch's last batch they count the epoch as done:
its validation and its hooks are skipped on resume, and every later epoch has a number that is one too small. Within a
validation they go on in its middle, and its metrics cover the remaining images only. Therefore the counters are written as if
no image had been validated yet. A weight average replaces the trained weights during a validation; the trained weights are
put back before they are saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging

from vitscope.training import lightning_internals

Pending = Literal["validation", "epoch end"]


def mark_unfinished_epoch(trainer: Trainer, checkpoint: dict[str, Any], is_epoch_over: bool) -> Pending | None:
    """Return what a resumed run has to do first, and write Lightning's counters in ``checkpoint`` so that it does.

    Args:
        trainer: Trainer that is fitting.
        checkpoint: Content of the checkpoint that is about to be written; changed in place.
        is_epoch_over: Whether the last batch of the epoch is done.

    Returns:
        ``"validation"`` or ``"epoch end"``; None where the resumed run goes on with the next batch.
    """
    if not (trainer.validating or lightning_internals.is_in_batch_end_hook(trainer)):
        return None
    is_validation_pending = trainer.validating or lightning_internals.is_validation_due(trainer)
    if not (is_validation_pending or is_epoch_over):
        return None
    lightning_internals.mark_batch_completed(checkpoint)
    if is_validation_pending:
        lightning_internals.mark_validation_begun(checkpoint)
        return "validation"
    lightning_internals.count_last_step(checkpoint)
    return "epoch end"


def finish_interrupted_epoch(trainer: Trainer, pending: str) -> None:
    """Let the first epoch of a resumed run end if it needs no further batch and no validation.

    Args:
        trainer: Trainer that has restored its loops and has made no step yet.
        pending: What `mark_unfinished_epoch` returned when the checkpoint was written; empty for None.
    """
    if pending == "epoch end" or not trainer.enable_validation:
        lightning_internals.mark_validation_done(trainer)
    lightning_internals.complete_restarted_epoch(trainer)


def leave_resumed_epoch(trainer: Trainer) -> None:
    """Let the next epoch begin with its first batch; to be called at the end of an epoch."""
    lightning_internals.end_restart_of_batches(trainer)


def use_averaged_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Replace the trained weights by their average in a run that was stopped after its last epoch.

    Lightning does so at the end of training, a hook that is not called where no step is left.
    """
    for callback in _weight_averages(trainer):
        callback.on_train_end(trainer, pl_module)


def restore_trained_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Replace the average by the trained weights within a validation that is stopped."""
    for callback in _weight_averages(trainer):
        callback.on_validation_epoch_end(trainer, pl_module)


def _weight_averages(trainer: Trainer) -> Iterator[WeightAveraging]:
    for callback in cast(Any, trainer).callbacks:  # declared at run time only
        if isinstance(callback, WeightAveraging):
            yield callback
