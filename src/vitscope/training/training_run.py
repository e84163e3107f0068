"""Train a network from its composed configuration: validate, find the start, build, dry run, fit, report.

Each stage hands a typed object to the next one: `ResumePoint`, `TrainingParts`, the `Run` and `FitParts`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitscope.analyses import announcement, measurement_plan, spec
from vitscope.config import (
    caps,
    cross_checks,
    error_translation,
    experiment_identity,
    factories,
    loading,
    model_facts,
)
from vitscope.config.dry_run import rehearse
from vitscope.config.keys import common_probe
from vitscope.config.validation import validate, writable
from vitscope.runs import resume_changes, run_dir, run_end, run_lock, run_search
from vitscope.runs.checkpoints.checkpoint_weights import AVERAGE
from vitscope.runs.metrics_log import Journal, last_values
from vitscope.runs.run_dir import Run
from vitscope.runs.scalar_loggers import run_mirror
from vitscope.runs.summary_table import print_headline
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime.errors import CheckpointError, ConfigError, StorageError
from vitscope.runtime.logging import is_main_process
from vitscope.runtime.stop_flag import Interrupted
from vitscope.training import run_logger
from vitscope.training.ddp_strategy import end_other_ranks
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.lightning_module import Classifier
from vitscope.training.resume_point import (
    NEW_HEAD,
    ResumePoint,
    adopt_checkpoint,
    check_choice_of_weights,
    find_resume_point,
    load_start_weights,
    report_nothing_to_do,
    take_up_run,
    takes_weights_only,
)
from vitscope.training.trainer_factory import build_module, build_trainer, check_accelerator

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingParts:
    """Network and data of a training, built from its configuration."""

    network: nn.Module
    data: Any


@dataclass(frozen=True)
class FitParts:
    """Lightning module, trainer, diagnostics and logger that fit the network, built for one run folder."""

    module: Classifier
    trainer: Any
    diagnostics: DiagnosticCallback
    logger: run_logger.RunLogger


@run_lock.released_at_end()
def train(cfg: DictConfig, run: Run | None = None) -> Run:
    """Train what a composed configuration describes.

    Args:
        cfg: Composed configuration of ``conf/train.yaml``; upper bounds of ``caps`` are applied in place.
        run: Run to resume; None for a new one, or for the one that ``ckpt_path`` finds.

    Returns:
        The run.

    Raises:
        VitscopeError: With the exit code of its kind.
    """
    _validate_training(cfg, is_resumed=run is not None)
    finished_run = _find_finished_run(cfg) if run is None else None
    if finished_run is not None:
        _logger.info(f"{finished_run.path} is a finished run of this configuration; nothing to do")
        return finished_run
    start = find_resume_point(cfg, run)
    if start.run is not None and start.is_finished:
        report_nothing_to_do(start.run, start.changes)
        return start.run
    _hold_folder(cfg, start)
    parts = _build_parts(cfg)
    rehearse(cfg, parts.network, parts.data)
    content = None
    if start.checkpoint is not None and (start.run is None or cfg.get("ckpt_head") == NEW_HEAD):
        # a file that does not fit is refused before a folder is made
        content = load_start_weights(cfg, parts.network, start.checkpoint)
    run = _open_run(cfg, start)
    _train_in_folder(cfg, run, start, parts, content)
    return run


def _validate_training(cfg: DictConfig, *, is_resumed: bool) -> None:
    common_probe.apply_common_probe(cfg)
    for name in loading.drop_unchosen(cfg):
        _logger.info(f"analysis.{name}: set by the experiment, but not chosen, and therefore left out")
    if is_resumed:  # the run's own limits have been lowered already, and those of this command are meant
        caps.apply_analysis_caps(cfg)
    else:
        caps.apply_caps(cfg)
    validate(cfg)
    check_choice_of_weights(cfg)
    check_accelerator(cfg)
    cross_checks.settle_class_counts(cfg)
    if not is_resumed:
        cross_checks.check_schedule_length(cfg)
        cross_checks.settle_own_network(cfg)


def _find_finished_run(cfg: DictConfig) -> Run | None:
    """Return a finished run of this configuration, where the configuration asks to skip what is finished."""
    if not cfg.skip_finished or cfg.ckpt_path not in (None, "last", "auto"):
        return None
    return run_search.finished(Path(cfg.paths.runs), experiment_identity.config_hash(cfg))


def _hold_folder(cfg: DictConfig, start: ResumePoint) -> None:
    """Hold the folder of a run that is resumed.

    Raises:
        StorageError: It cannot be written, or another process holds it.
    """
    if start.run is None:
        return
    if not run_lock.holds(start.run.path):  # a finished run that is trained further
        take_up_run(start.run, cfg)
    if not (writable(start.run.path) and writable(start.run.checkpoints)):
        raise StorageError("run", start.run.path, "not writable", "give it write permission, or start a new run")


def _build_parts(cfg: DictConfig) -> TrainingParts:
    """Build the network and the data; what is missing or broken is found before a run folder is made."""
    network = factories.model(cfg)
    data = factories.data(cfg)
    data.adapt_to(network)
    data.setup("fit")
    return TrainingParts(network, data)


def _open_run(cfg: DictConfig, start: ResumePoint) -> Run:
    """Return the run to train in, a new one where none is resumed, and write down what its network is."""
    run = start.run
    if run is None:
        run = _new_run(cfg)
    run_end.log_tracebacks_to(run)
    if is_main_process() and model_facts.KEY not in run.provenance():
        run.note(**{model_facts.KEY: model_facts.of_model(cfg)})
    return run


def _new_run(cfg: DictConfig) -> Run:
    if not is_main_process():
        return _await_run(run_dir.requested_run_folder(cfg))
    run = run_dir.create(cfg, "train")
    os.environ[run_dir.ENVIRONMENT] = str(run.path)  # ranks that Lightning starts must not make another
    return run


def _await_run(path: Path, seconds: float = 60.0) -> Run:
    deadline = time.monotonic() + seconds
    while not (path / "provenance.json").exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                "run_dir", path, f"rank 0 created no run folder within {seconds:.0f} s", "see rank 0's error"
            )
        time.sleep(0.1)
    return Run(path)


def _train_in_folder(
    cfg: DictConfig, run: Run, start: ResumePoint, parts: TrainingParts, content: Mapping[str, Any] | None
) -> None:
    """Fit, test and report; note how the training ended, whatever ended it.

    Args:
        cfg: Configuration of the training.
        run: Run folder.
        start: What it starts from.
        parts: Network and data.
        content: Contents of the file that a new run starts from; None where it has not been read.
    """
    start_time = time.monotonic()
    is_refused = start.run is not None  # until its checkpoint is adopted, a resumed run is as it was before
    mirror = run_mirror.start(cfg, run, "train")
    code = 1
    try:
        fit_parts = _build_fit_parts(cfg, run, parts, mirror)
        checkpoint = _adopt_start(cfg, run, start, parts, fit_parts, content)
        content = None  # its memory is the training's
        is_refused = False
        _fit(cfg, parts, fit_parts, checkpoint)
        _report(run, mirror)
        code = 0
    except BaseException as error:
        code = error_translation.code_for(error)
        if isinstance(error, Interrupted):
            mirror.preempting()
        raise
    finally:
        try:
            if is_main_process():
                os.environ.pop(run_dir.ENVIRONMENT, None)  # the next run of this process makes a folder of its own
                if not is_refused:
                    run_end.note_end(run, code, wall_s=round(time.monotonic() - start_time, 3))
        finally:
            mirror.finish(code)


def _build_fit_parts(cfg: DictConfig, run: Run, parts: TrainingParts, mirror: WandbMirror) -> FitParts:
    analyses = spec.parse(cfg.analysis)
    announcement.announce(cfg, analyses, parts.data, count=("train", "val"), of=" of the diagnostics")
    if is_main_process():
        measurement_plan.announce_measurements(analyses, cfg.trainer, parts.network, parts.data)
    module = build_module(cfg, parts.network, parts.data)
    diagnostics = DiagnosticCallback(cfg, analyses, run, mirror)
    logger = run_logger.RunLogger(run, Journal(run.journal), mirror)
    return FitParts(module, build_trainer(cfg, run, logger, diagnostics), diagnostics, logger)


def _adopt_start(
    cfg: DictConfig,
    run: Run,
    start: ResumePoint,
    parts: TrainingParts,
    fit_parts: FitParts,
    content: Mapping[str, Any] | None,
) -> Path | None:
    """Check the checkpoint to start from and note in the run folder what was resumed or started from.

    Returns:
        The checkpoint whose whole state is restored; None without one, or where only its weights were loaded.
    """
    rates = {key: value for key, value in loading.plain(cfg.optimizer).items() if key != "schedule"}
    identity = {
        "batch_size": parts.data.batch_size,
        "world_size": fit_parts.trainer.world_size,
        "num_classes": parts.data.num_classes,
        "optimizer": loading.digest(rates),
    }
    config_hash = experiment_identity.config_hash(cfg)
    fit_parts.module.identity = {**identity, "seed": int(cfg.seed), "config_hash": config_hash}
    if start.changes is not None:
        identity["seed"] = int(cfg.seed)
    checkpoint, step = start.checkpoint, 0
    if checkpoint is not None:
        checkpoint, step = adopt_checkpoint(
            checkpoint,
            parts.network,
            identity,
            run,
            fit_parts.trainer,
            optimizer=fit_parts.module.new_optimizer(),
            weights_only=takes_weights_only(cfg),
            average=cfg.get("ckpt") == AVERAGE,
            content=content,
        )
    if is_main_process():
        _note_start(cfg, run, start, checkpoint, step)
    return checkpoint


def _note_start(cfg: DictConfig, run: Run, start: ResumePoint, checkpoint: Path | None, step: int) -> None:
    if start.changes is not None:
        resume_changes.record(run, cfg, start.changes, step)
    elif cfg.ckpt_path not in (None, "last", "auto"):
        weights_only = checkpoint is None
        facts = {"checkpoint": str(cfg.ckpt_path), "step": step, "weights_only": weights_only}
        if cfg.get("ckpt") == AVERAGE:
            facts["averages"] = True
        if cfg.get("ckpt_head") == NEW_HEAD:
            facts["new_head"] = True
        run.note(started_from=facts)


def _fit(cfg: DictConfig, parts: TrainingParts, fit_parts: FitParts, checkpoint: Path | None) -> None:
    """Fit, and test where the configuration asks for it.

    Raises:
        CheckpointError: The state of the checkpoint could not be restored.
    """
    trainer, module = fit_parts.trainer, fit_parts.module
    try:
        trainer.fit(module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
        if cfg.test:
            trainer.test(module, datamodule=parts.data, verbose=False)
    except BaseException as error:
        end_other_ranks(trainer)
        if checkpoint is not None and not fit_parts.diagnostics.started and _is_defect(error):  # it was being restored
            reason = f"cannot be resumed ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            fix = "use the model, optimizer and callbacks it was made with"
            raise CheckpointError("ckpt_path", checkpoint, reason, fix) from error
        raise
    finally:
        fit_parts.logger.journal.close()


def _is_defect(error: BaseException) -> bool:
    """Tell whether an error is none that a user is told in one line."""
    if not isinstance(error, Exception) or isinstance(error, Interrupted):
        return False
    return error_translation.explain(error) is None


def _report(run: Run, mirror: WandbMirror) -> None:
    """Print the headline table and write W&B's summary, on rank 0."""
    if is_main_process():
        values = last_values(run.journal)
        mirror.summary({name: value for name, value in values.items() if isinstance(value, int | float)})
        print_headline(run, values, mirror)
