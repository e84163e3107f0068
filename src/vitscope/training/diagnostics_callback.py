"""What happens around training: diagnostics, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer

from vitscope.analyses import runner
from vitscope.analyses.context import Place
from vitscope.analyses.spec import Analysis
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import Mirror
from vitscope.training import resume_state


class DiagnosticCallback(Callback):
    """Runs analyses on the live network at the start, every n epochs and at the end of training.

    It uses the functions that ``analyze.py`` uses and leaves no trace in training: losses with it and without it are equal
    bit for bit.
    """

    def __init__(self, cfg: DictConfig, chosen: Sequence[Analysis], run: Run, mirror: Mirror) -> None:
        self.cfg, self.chosen, self.run, self.mirror = cfg, list(chosen), run, mirror
        self.results: dict[str, Any] = {}
        self.started = False
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is measured before a checkpoint is restored."""
        self.started = stage != "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the initial network; going on from the end of an epoch, what a stop left unmeasured there."""
        if trainer.global_step == 0:
            self._perform([a for a in self.chosen if a.due_at_start], trainer, pl_module, "init", None)
            return
        self._after_epoch_before(trainer, pl_module)

    def _after_epoch_before(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Going on from the end of an epoch: measure what is due after it; results that are there are not measured again."""
        epoch, batch = getattr(pl_module, "position")  # noqa: B009
        if batch == 0 and epoch > 0:
            due = [a for a in self.chosen if a.due_after(epoch - 1)]
            self._perform(due, trainer, pl_module, f"epoch-{epoch - 1:04d}", epoch - 1)

    def on_train_batch_end(self, *_: Any) -> None:
        """Note that training goes on: the first step has used all that a checkpoint restored."""
        self.started = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is due after this epoch."""
        epoch = trainer.current_epoch
        due = [a for a in self.chosen if a.due_after(epoch)]
        self._perform(due, trainer, pl_module, f"epoch-{epoch:04d}", epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained network."""
        self._measure_end(trainer, pl_module, trainer.current_epoch - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure it where nothing was left to train: the run was stopped after its last epoch was saved."""
        if not self._ended:
            self._after_epoch_before(trainer, pl_module)  # of the trained weights; their average is measured at the end
            resume_state.take_average(trainer, pl_module)
            epoch, batch = getattr(pl_module, "position")  # noqa: B009
            self._measure_end(trainer, pl_module, epoch if batch else epoch - 1)

    def _measure_end(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self._ended = True
        due = [a for a in self.chosen if a.due_at_end]
        self._perform(due, trainer, pl_module, "end", max(epoch, 0))

    def _perform(
        self, due: Sequence[Analysis], trainer: Trainer, pl_module: LightningModule, tag: str, epoch: int | None
    ) -> None:
        place = Place(
            self.cfg, self.run, cast(Any, pl_module.model), getattr(trainer, "datamodule"), tag, epoch,  # noqa: B009
            trainer.global_step, self.mirror,
            {"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]}, due,
        )  # fmt: skip
        self.started = self.started or bool(due)
        for analysis in due:
            self.results[analysis.name] = runner.perform(analysis, place)
