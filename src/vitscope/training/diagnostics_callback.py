"""Lightning callback that runs analyses during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from vitscope.analyses import runner
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis, step_tag
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime import distributed
from vitscope.runtime.stop_flag import Interrupted
from vitscope.training import resume_state
from vitscope.training.accumulation import is_accumulating
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.stop_callbacks import agreed_signal


class DiagnosticCallback(Callback):
    """Runs analyses on the live network at the start, after chosen steps and epochs, and at the end of training.

    It calls the functions that ``analyze.py`` calls. Training is not affected: losses with and without the callback are equal
    bit for bit. A step is one of the optimizer, Lightning's ``global_step``: with ``accumulate_grad_batches`` it takes several
    batches. What is measured after a step is the network with that step's weights, under the learning rate of the next step.

    A run that resumes measures what a stop left out at the step or the epoch that its checkpoint was written at. Steps that it
    repeats after a kill find their results by the hash of the weights.

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
        self._is_step_left_out = False  # a stop came while a step was measured after which none may be made

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note that a checkpoint may have to be restored before a fit."""
        self.started = stage != "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the initial network, or those that an interruption left out at the end of an epoch."""
        if trainer.global_step == 0:
            self._run([a for a in self.analyses if a.due_at_start], trainer, pl_module, "init", None)
            return
        self._run_missing(trainer, pl_module)

    def _run_missing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses that are due after the step, and after the epoch, at whose end a run resumes.

        Those with a result are skipped.
        """
        epoch, batch = cast(Any, pl_module).position
        self._run_step(trainer, pl_module, max(epoch if batch else epoch - 1, 0))
        if batch == 0 and epoch > 0:
            analyses = [a for a in self.analyses if a.due_after(epoch - 1)]
            self._run(analyses, trainer, pl_module, f"epoch-{epoch - 1:04d}", epoch - 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Run the analyses that are due after this step.

        Training has begun by then: the first step has used all that a checkpoint restored.
        """
        self.started = True
        is_due = any(analysis.due_at_step(trainer.global_step) for analysis in self.analyses)
        if not is_due or is_accumulating(trainer):
            return
        if agreed_signal(pl_module):  # the same on all ranks; what is left out is measured on a resume
            self._is_step_left_out = True
            return
        try:
            self._run_step(trainer, pl_module, trainer.current_epoch)
        except Interrupted:
            if trainer.world_size > 1:  # other ranks may be in the middle of a product
                raise
            self._is_step_left_out = True
            for callback in cast(Any, trainer).callbacks:  # the step is saved, and logged before training stops
                if isinstance(callback, Checkpoints):
                    callback.on_train_batch_end(trainer, pl_module)

    def _run_step(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        step = trainer.global_step
        analyses = [a for a in self.analyses if a.due_at_step(step)]
        self._run(analyses, trainer, pl_module, step_tag(step), epoch, draws=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses that are due after this epoch."""
        epoch = trainer.current_epoch
        analyses = [a for a in self.analyses if a.due_after(epoch)]
        self._run(analyses, trainer, pl_module, f"epoch-{epoch:04d}", epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the trained network."""
        if self._is_step_left_out:  # raises Interrupted again, as the training may not count as finished without them
            self._run_missing(trainer, pl_module)
        self._run_final(trainer, pl_module, trainer.current_epoch - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the analyses of the trained network where no step was left: the run was stopped after its last epoch was saved."""
        if not self._ended:
            self._run_missing(trainer, pl_module)  # with the trained weights; their average is measured below
            resume_state.use_averaged_weights(trainer, pl_module)
            epoch, batch = cast(Any, pl_module).position
            self._run_final(trainer, pl_module, epoch if batch else epoch - 1)

    def _run_final(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self._ended = True
        analyses = [a for a in self.analyses if a.due_at_end]
        self._run(analyses, trainer, pl_module, "end", max(epoch, 0))

    def _run(
        self,
        analyses: Sequence[Analysis],
        trainer: Trainer,
        pl_module: LightningModule,
        tag: str,
        epoch: int | None,
        *,
        draws: bool = True,
    ) -> None:
        place = AnalysisContext(
            self.cfg, self.run, cast(Any, pl_module.model), cast(Any, trainer).datamodule, tag, epoch,
            trainer.global_step, self.mirror,
            {"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]}, analyses,
            draws=draws,
        )  # fmt: skip
        self.started = self.started or bool(analyses)
        if analyses:
            _share_buffers(place.network)
        for analysis in analyses:
            self.results[analysis.name] = runner.perform(analysis, place)


def _share_buffers(network: nn.Module) -> None:
    """Give all ranks the first one's buffers, as the next pass of the training would: the last step left each its own.

    Running statistics of BatchNorm differ between ranks then, and ranks that measure a share each would measure other functions.
    """
    for buffer in network.buffers():
        distributed.broadcast(buffer)
