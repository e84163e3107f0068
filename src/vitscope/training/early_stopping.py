"""Makes the checks of Lightning's early stopping part of what an epoch's checkpoint holds.

Lightning makes them after all other callbacks of an epoch's end, when ``last.ckpt`` is already written: a run that goes on from
there would never make that epoch's check, and a stop that was decided there would be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason


class EarlyChecks(Callback):
    """Lets early stopping check before an epoch is saved; stands before the callback that saves.

    It also keeps the monitored values, which Lightning forgets: an epoch without a validation is checked by the last one's value,
    in a resumed run as in an uninterrupted one.

    Args:
        stoppings: the callbacks whose checks are made here in place of where Lightning makes them.
    """

    def __init__(self, stoppings: Sequence[EarlyStopping]) -> None:
        self.stoppings = list(stoppings)
        self._checks: list[Callable[..., None]] = [stopping.on_train_epoch_end for stopping in stoppings]
        self._monitored: dict[str, float] = {}
        for stopping in self.stoppings:
            setattr(stopping, "on_train_epoch_end", _check_nothing)  # noqa: B010  a method to a type checker

    def state_dict(self) -> dict[str, Any]:
        """Return the values last monitored."""
        return {"monitored": dict(self._monitored)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._monitored = dict(state_dict.get("monitored", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint was restored: end a training that had been stopped early before it was interrupted."""
        if any(stopping.stopping_reason != EarlyStoppingReason.NOT_STOPPED for stopping in self.stoppings):
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the monitored values of the last validation."""
        for name, value in self._monitored.items():
            trainer.callback_metrics.setdefault(name, torch.tensor(value))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitored values, for a checkpoint that is written before the epoch's end."""
        self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the epoch."""
        self._keep(trainer)
        for check in self._checks:
            check(trainer, pl_module)

    def _keep(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        names = {str(stopping.monitor) for stopping in self.stoppings} & metrics.keys()
        self._monitored |= {name: float(metrics[name]) for name in names}


def _check_nothing(*_: Any) -> None:
    """Stand for a check that is made elsewhere."""
