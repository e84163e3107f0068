"""Private interfaces of PyTorch Lightning, which may change with any release: the only module that touches them.

Lightning's loops keep counters of what has begun and what is done; a checkpoint holds them under ``loops``. Its public
interface neither tells whether a validation follows a batch nor lets a checkpoint be written between a batch and that
validation so that the validation is made on resume. `vitscope.training.resume_state` uses these functions for that.

`tests/contracts/test_lightning.py` states what each of them has to do. On a new release, run ``make test-newest``.
"""

from __future__ import annotations

import subprocess
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loops.loop import _Loop

#: counters of a validation that has begun and has seen no batch: Lightning runs all of it on resume
_NO_BATCH_VALIDATED = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def is_in_batch_end_hook(trainer: Trainer) -> bool:
    """Tell whether the training loop is in a hook after a batch, which the loop does not count as completed yet."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.completed == progress.processed - 1


def is_validation_due(trainer: Trainer) -> bool:
    """Tell whether the training loop validates after the batch at which it is."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def mark_batch_completed(checkpoint: dict[str, Any]) -> None:
    """Count the last training batch as completed in a checkpoint that is written in a hook after it."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        counters["completed"] = counters["processed"]


def mark_validation_begun(checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint's counters as if a validation had begun and seen no batch, so that a resumed run makes all of it."""
    counters = {"total": dict(_NO_BATCH_VALIDATED), "current": dict(_NO_BATCH_VALIDATED), "is_last_batch": False}
    checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = counters


def count_last_step(checkpoint: dict[str, Any]) -> None:
    """Count the last optimizer step in a checkpoint's counter of logged steps; Lightning does so after the hooks of its batch."""
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def mark_validation_done(trainer: Trainer) -> None:
    """Let a resumed epoch end without a validation, for which Lightning would wait."""
    trainer.fit_loop.epoch_loop.val_loop._has_run = True


def complete_restarted_epoch(trainer: Trainer) -> None:
    """Count an epoch as completed that had ended before its checkpoint was written, where Lightning would end it again.

    It would with ``max_steps``: then the property ``restarting`` of the loop cannot be set to False, and only the setter of
    its base class can.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        set_restarting = _Loop.restarting.fset
        assert set_restarting is not None  # see the contract test
        set_restarting(loop, False)
        loop.reset_restart_stage()


def end_restart_of_batches(trainer: Trainer) -> None:
    """Let the loop over batches count from 0 again in the next epoch, after an epoch of a resumed run that had no batch left.

    The loop does so itself after its first batch or validation. Without any, it would go on to take each later epoch for the
    one that is resumed: for done at once.
    """
    trainer.fit_loop.epoch_loop.on_iteration_done()


def load_training_data(trainer: Trainer) -> None:
    """Let Lightning count the training batches of an epoch now, where ``trainer.num_training_batches`` is still infinite."""
    trainer.fit_loop.setup_data()


def keep_signal_handlers(trainer: Trainer) -> None:
    """Let the process keep its own signal handlers during a fit.

    Lightning's handler of SIGTERM would run before an existing one, broadcast to the other ranks from inside the handler, and
    end the training after the current batch with exit code 0 and without a checkpoint. The trainer has no option against it.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def child_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes of the other ranks that Lightning started from this one."""
    return list(getattr(trainer.strategy.launcher, "procs", None) or [])
