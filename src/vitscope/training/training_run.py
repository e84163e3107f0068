"""One training run from its composed configuration: validate, dry run, build, fit, report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitscope.analyses import spec
from vitscope.config import caps, error_translation, experiment_identity, factories, loading, model_facts
from vitscope.config.dry_run import rehearse
from vitscope.config.validation import validate, writable
from vitscope.runs import (
    checkpoint_io,
    checkpoint_weights,
    resume_changes,
    run_dir,
    run_end,
    run_lock,
    wandb_mirror,
)
from vitscope.runs.metrics_log import Journal, last_values
from vitscope.runs.resume_changes import Change
from vitscope.runs.run_dir import Run
from vitscope.runs.summary_table import print_headline
from vitscope.runtime.errors import CheckpointError, ConfigError, StorageError
from vitscope.runtime.logging import is_main_process, notify
from vitscope.runtime.stop_flag import Interrupted
from vitscope.training import run_logger
from vitscope.training.ddp_strategy import end_others
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.resume_point import (
    adopt_checkpoint,
    find_resume_point,
    has_steps_left,
    judge_changes,
    report_nothing_to_do,
    step_of,
    take_up_run,
)
from vitscope.training.trainer_factory import build_module, build_trainer


@run_lock.released_at_end()
def train(cfg: DictConfig, run: Run | None = None) -> Run:
    """Train what a composed configuration describes; go on with ``run`` where one is given.

    Returns:
        The run.

    Raises:
        VitscopeError: with the exit code of its kind.
    """
    for name in loading.drop_unchosen(cfg):
        notify(f"analysis.{name}: the experiment sets it, but it was not chosen; left out")
    if run is None:
        caps.apply_caps(cfg)
    else:  # the run's own limits have been lowered already, and those of this command are meant
        caps.apply_analysis_caps(cfg)
    validate(cfg)
    afresh = run is None and cfg.ckpt_path in (None, "last", "auto")
    done = (
        run_dir.finished(Path(cfg.paths.runs), experiment_identity.config_hash(cfg))
        if cfg.skip_finished and afresh
        else None
    )
    if done is not None:
        notify(f"{done.path} is a finished run of this configuration; nothing to do")
        return done
    run, ckpt = find_resume_point(cfg, run)
    changed = judge_changes(cfg, run, ckpt)
    finished = run is not None and ckpt is not None and run.provenance().get("status") == "finished"
    if run is not None and ckpt is not None and finished and not has_steps_left(cfg, changed, ckpt):
        report_nothing_to_do(run, changed)
        return run
    if run is not None and not run_lock.holds(run.path):  # a finished one that goes further
        take_up_run(run, cfg)
    if run is not None and not (writable(run.path) and writable(run.checkpoints)):
        raise StorageError("run", run.path, "not writable", "make it so, or start a new run")
    network = factories.model(cfg)
    data = factories.data(cfg)
    data.adapt_to(network)
    data.setup("fit")  # what is missing or broken is found before there is a run
    rehearse(cfg, network, data)
    if run is None:
        if ckpt is not None:
            checkpoint_weights.load_weights(
                network, checkpoint_io.read(ckpt), ckpt
            )  # a file that does not fit leaves no run behind
        run = _new_run(cfg)
    run_end.log_tracebacks_to(run)
    if is_main_process() and model_facts.KEY not in run.provenance():
        run.note(**{model_facts.KEY: model_facts.of_model(cfg)})
    started = time.monotonic()
    mirror = wandb_mirror.start(cfg, run, "train", notify)
    code = 1
    try:
        _fit(cfg, run, network, data, ckpt, mirror, changed)
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
                run_end.note_end(run, code, wall_s=round(time.monotonic() - started, 3))
        finally:
            mirror.finish(code)
    return run


def _fit(
    cfg: DictConfig,
    run: Run,
    network: Any,
    data: Any,
    ckpt: Path | None,
    mirror: wandb_mirror.Mirror,
    changed: Sequence[Change] | None,
) -> None:
    chosen = spec.parse(cfg.analysis)
    module = build_module(cfg, network, data)
    diagnostics = DiagnosticCallback(cfg, chosen, run, mirror)
    logger = run_logger.RunLogger(run, Journal(run.journal), mirror)
    trainer = build_trainer(cfg, run, logger, diagnostics)
    rates = {key: value for key, value in loading.plain(cfg.optimizer).items() if key != "schedule"}
    identity = {"batch_size": data.batch_size, "world_size": trainer.world_size, "num_classes": data.num_classes,
                "optimizer": loading.digest(rates)}  # fmt: skip
    module.identity = {**identity, "seed": int(cfg.seed), "config_hash": experiment_identity.config_hash(cfg)}
    if changed is not None:
        identity["seed"] = int(cfg.seed)
    if ckpt is not None:
        ckpt = adopt_checkpoint(ckpt, network, identity, run, trainer, weights_only=bool(cfg.get("ckpt_weights_only")))
    if is_main_process():
        if changed is not None:
            resume_changes.record(run, cfg, changed, step_of(ckpt))
        elif cfg.ckpt_path not in (None, "last", "auto"):
            run.note(
                started_from={"checkpoint": str(cfg.ckpt_path), "step": step_of(ckpt), "weights_only": ckpt is None}
            )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
    except BaseException as error:
        end_others(trainer)
        if ckpt is not None and not diagnostics.started and _is_defect(error):  # it was being restored
            why = f"cannot be gone on from ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            fix = "use the model, optimizer and callbacks it was made with"
            raise CheckpointError("ckpt_path", ckpt, why, fix) from error
        raise
    finally:
        logger.journal.close()
    if is_main_process():
        values = last_values(run.journal)
        mirror.summary({k: v for k, v in values.items() if isinstance(v, int | float)})
        print_headline(run, values, mirror)


def _is_defect(error: BaseException) -> bool:
    return (
        isinstance(error, Exception) and not isinstance(error, Interrupted) and error_translation.explain(error) is None
    )


def _new_run(cfg: DictConfig) -> Run:
    if not is_main_process():
        return _awaited(run_dir.chosen(cfg))
    run = run_dir.create(cfg, "train")
    os.environ[run_dir.ENVIRONMENT] = str(run.path)  # ranks that Lightning starts must not make another
    return run


def _awaited(path: Path, seconds: float = 60.0) -> Run:
    deadline = time.monotonic() + seconds
    while not (path / "provenance.json").exists():
        if time.monotonic() > deadline:
            raise ConfigError("run_dir", path, "rank 0 made no run there", "see rank 0's error")
        time.sleep(0.1)
    return Run(path)
