"""Lightning callback that runs analyses during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer

from vitscope.analyses import runner
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.training import resume_state


class DiagnosticCallback(Callback):
    """Runs analyses on the live network at the start, every n epochs and at the end of training.

    It calls the functions that ``analyze.py`` calls. Training is not affected: losses with and without the callback are equal
    bit for bit.

    Args:
        cfg: Composed configuration of the run.
        analyses: Analyses to run, each with the moments at which it is due.
        run: Run folder that results are written to.
        mirror: W&B run that scalars and figures are sent to.

    Attributes:
        results: Last result of each analysis, by name.
        started: Whether training or an analysis has begun, so that an error is not one of restoring a checkpoint.
    """

    def __init__(self, cfg: DictConfig, analyses: Sequence[Analysis], run: Run, mirror: WandbMirror) -> None:
        self.cfg, self.analyses, self.run, self.mirror = cfg, list(analyses), run, mirror
        self.results: dict[str, Any] = {}
        self.started = False
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note that a checkpoint may have to be restored before a fit."""
        self.started = stage != "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the initial network, or those that an interruption left out at the end of an epoch."""
        if trainer.global_step == 0:
            self._run([a for a in self.analyses if a.due_at_start], trainer, pl_module, "init", None)
            return
        self._run_missing_of_last_epoch(trainer, pl_module)

    def _run_missing_of_last_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses that are due after the epoch at whose end a run resumes; those with a result are skipped."""
        epoch, batch = cast(Any, pl_module).position
        if batch == 0 and epoch > 0:
            analyses = [a for a in self.analyses if a.due_after(epoch - 1)]
            self._run(analyses, trainer, pl_module, f"epoch-{epoch - 1:04d}", epoch - 1)

    def on_train_batch_end(self, *_: Any) -> None:
        """Note that training has begun: the first step has used all that a checkpoint restored."""
        self.started = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses that are due after this epoch."""
        epoch = trainer.current_epoch
        analyses = [a for a in self.analyses if a.due_after(epoch)]
        self._run(analyses, trainer, pl_module, f"epoch-{epoch:04d}", epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the trained network."""
        self._run_final(trainer, pl_module, trainer.current_epoch - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the trained network where no step was left: the run was stopped after its last epoch was saved."""
        if not self._ended:
            self._run_missing_of_last_epoch(
                trainer, pl_module
            )  # with the trained weights; their average is measured below
            resume_state.use_averaged_weights(trainer, pl_module)
            epoch, batch = cast(Any, pl_module).position
            self._run_final(trainer, pl_module, epoch if batch else epoch - 1)

    def _run_final(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self._ended = True
        analyses = [a for a in self.analyses if a.due_at_end]
        self._run(analyses, trainer, pl_module, "end", max(epoch, 0))

    def _run(
        self, analyses: Sequence[Analysis], trainer: Trainer, pl_module: LightningModule, tag: str, epoch: int | None
    ) -> None:
        place = AnalysisContext(
            self.cfg, self.run, cast(Any, pl_module.model), cast(Any, trainer).datamodule, tag, epoch,
            trainer.global_step, self.mirror,
            {"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]}, analyses,
        )  # fmt: skip
        self.started = self.started or bool(analyses)
        for analysis in analyses:
            self.results[analysis.name] = runner.perform(analysis, place)
