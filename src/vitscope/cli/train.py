"""``train.py``: compose, train, evaluate, diagnose, log."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from vitscope.analyses import runner
from vitscope.cli import exit_codes, hydra_overrides
from vitscope.cli.summary_table import print_headline
from vitscope.config import factories, loading, model_facts
from vitscope.config.dry_run import rehearse
from vitscope.config.validation import validate, writable
from vitscope.runs import checkpoint_io, checkpoint_schema, resume_changes, run_dir, run_lock, wandb_mirror
from vitscope.runs.checkpoint_io import AtomicCheckpointIO
from vitscope.runs.metrics_log import Journal, last_values
from vitscope.runs.resume_changes import Change
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError, ConfigError, StorageError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import hydra_multirun
from vitscope.training.ddp_strategy import end_others
from vitscope.training.diagnostics_callback import (
    Checkpoints,
    DiagnosticCallback,
    HeldFolder,
    SameConfiguration,
    StopsWithoutSaving,
)
from vitscope.training.early_stopping import EarlyChecks
from vitscope.training.lightning_module import Classifier
from vitscope.training.progress_callbacks import EpochAccuracy, PlainProgress

#: what a sweeper of Hydra that learns is told of a job
METRIC = "val/accuracy"


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    argv = sys.argv[1:]
    named = hydra_overrides.value_of(argv, "run")
    if named is None or hydra_multirun.asked(argv):
        with hydra_multirun.reported(argv):
            hydra_overrides.uncaught(_composed)
        return
    run = run_dir.find(named)
    cfg = run.config()
    hydra_overrides.apply(cfg, [a for a in argv if not a.startswith("run=")])
    train(cfg, run)


@hydra.main(version_base="1.3", config_path=str(loading.folder()), config_name="train")
@hydra_overrides.kept_error
def _composed(cfg: DictConfig) -> float | None:
    if hydra_multirun.is_job():
        return hydra_multirun.job(METRIC)
    train(cfg)
    return None


@run_lock.released_at_end()
def train(cfg: DictConfig, run: Run | None = None) -> Run:
    """Train what a composed configuration describes; go on with ``run`` where one is given.

    Returns:
        The run.

    Raises:
        VitscopeError: with the exit code of its kind.
    """
    for name in loading.drop_unchosen(cfg):
        _say(f"analysis.{name}: the experiment sets it, but it was not chosen; left out")
    if run is None:
        loading.apply_caps(cfg)
    else:  # the run's own limits have been lowered already, and those of this command are meant
        loading.apply_analysis_caps(cfg)
    validate(cfg)
    afresh = run is None and cfg.ckpt_path in (None, "last", "auto")
    done = run_dir.finished(Path(cfg.paths.runs), loading.config_hash(cfg)) if cfg.skip_finished and afresh else None
    if done is not None:
        _say(f"{done.path} is a finished run of this configuration; nothing to do")
        return done
    run, ckpt = _resume_point(cfg, run)
    changed = _judged_changes(cfg, run, ckpt)
    finished = run is not None and ckpt is not None and run.provenance().get("status") == "finished"
    if run is not None and ckpt is not None and finished and not _goes_further(cfg, changed, ckpt):
        _say_nothing_to_do(run, changed)
        return run
    if run is not None and not run_lock.holds(run.path):  # a finished one that goes further
        _take_up(run, cfg)
    if run is not None and not (writable(run.path) and writable(run.checkpoints)):
        raise StorageError("run", run.path, "not writable", "make it so, or start a new run")
    network = factories.model(cfg)
    data = factories.data(cfg)
    data.adapt_to(network)
    data.setup("fit")  # what is missing or broken is found before there is a run
    rehearse(cfg, network, data)
    if run is None:
        if ckpt is not None:
            factories.load_weights(
                network, checkpoint_io.read(ckpt), ckpt
            )  # a file that does not fit leaves no run behind
        run = _new_run(cfg)
    exit_codes.entered(run)
    if _is_main() and model_facts.KEY not in run.provenance():
        run.note(**{model_facts.KEY: model_facts.of_model(cfg)})
    started = time.monotonic()
    mirror = wandb_mirror.start(cfg, run, "train", _say)
    code = 1
    try:
        _fit(cfg, run, network, data, ckpt, mirror, changed)
        code = 0
    except BaseException as error:
        code = exit_codes.code_for(error)
        if isinstance(error, Interrupted):
            mirror.preempting()
        raise
    finally:
        try:
            if _is_main():
                os.environ.pop(run_dir.ENVIRONMENT, None)  # the next run of this process makes a folder of its own
                exit_codes.note_end(run, code, wall_s=round(time.monotonic() - started, 3))
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
    chosen = runner.parse(cfg.analysis)
    module = _classifier(cfg, network, data)
    diagnostics = DiagnosticCallback(cfg, chosen, run, mirror)
    logger = wandb_mirror.RunLogger(run, Journal(run.journal), mirror)
    trainer = _trainer(cfg, run, logger, diagnostics)
    rates = {key: value for key, value in loading.plain(cfg.optimizer).items() if key != "schedule"}
    identity = {"batch_size": data.batch_size, "world_size": trainer.world_size, "num_classes": data.num_classes,
                "optimizer": loading.digest(rates)}  # fmt: skip
    module.identity = {**identity, "seed": int(cfg.seed), "config_hash": loading.config_hash(cfg)}
    if changed is not None:
        identity["seed"] = int(cfg.seed)
    if ckpt is not None:
        ckpt = _adopted(ckpt, network, identity, run, trainer, weights_only=bool(cfg.get("ckpt_weights_only")))
    if _is_main():
        if changed is not None:
            resume_changes.record(run, cfg, changed, _step(ckpt))
        elif cfg.ckpt_path not in (None, "last", "auto"):
            run.note(started_from={"checkpoint": str(cfg.ckpt_path), "step": _step(ckpt), "weights_only": ckpt is None})
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
    if _is_main():
        values = last_values(run.journal)
        mirror.summary({k: v for k, v in values.items() if isinstance(v, int | float)})
        print_headline(run, values, mirror)


def _is_defect(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, Interrupted) and exit_codes.explain(error) is None


def _classifier(cfg: DictConfig, network: Any, data: Any) -> Classifier:
    optimizer = loading.plain(cfg.optimizer)
    lr_schedule = optimizer.pop("schedule", {})
    return Classifier(
        network,
        num_classes=data.num_classes,
        optimizer=loading.instantiate({**optimizer, "_partial_": True}, "optimizer"),
        lr_schedule=lr_schedule,
        label_smoothing=float(cfg.objective.label_smoothing),
        mix=data.mixed if data.mixes else None,
        seed=int(cfg.seed),
        compile=bool(cfg.compile),
        channels_last=bool(cfg.get("channels_last", False)),
    )


def _trainer(cfg: DictConfig, run: Run, logger: Any, diagnostics: DiagnosticCallback) -> Any:
    from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # the loaders are ours, in memory, and know their position; Lightning's advice on workers and samplers does not apply
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.14
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )
    warnings.filterwarnings("ignore", message=".*You're resuming from a checkpoint that ended before the epoch ended.*")
    shown = cfg.trainer.get("enable_progress_bar", True)
    bar = [] if not shown else [RichProgressBar() if sys.stdout.isatty() else PlainProgress()]
    own = [loading.instantiate(node, f"callbacks.{name}") for name, node in cfg.callbacks.items()]
    own.sort(
        key=lambda callback: isinstance(callback, Checkpoints)
    )  # a stop is saved after an average has seen the step
    stoppings = [callback for callback in own if isinstance(callback, EarlyStopping)]
    if stoppings:  # an epoch is checked before it is saved
        own.insert(0, EarlyChecks(stoppings))
    if not any(isinstance(callback, Checkpoints) for callback in own):
        own.append(StopsWithoutSaving())
    trainer = loading.instantiate(
        cfg.trainer,
        "trainer",
        logger=logger,
        callbacks=[
            HeldFolder(run),
            SameConfiguration(loading.config_hash(cfg)),
            EpochAccuracy(),
            *own,
            *bar,
            diagnostics,
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.path),
        enable_progress_bar=shown and sys.stdout.isatty(),
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    # Lightning would put its SIGTERM handler before ours, broadcast from inside it and end with exit code 0
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _resume_point(cfg: DictConfig, run: Run | None) -> tuple[Run | None, Path | None]:
    """Return the run to go on with and the checkpoint; no run: a new one, from a file's state where one is named."""
    wanted = cfg.ckpt_path
    if run is None and wanted in ("last", "auto"):
        run = run_dir.unfinished(Path(cfg.paths.runs), loading.config_hash(cfg))
        if run is None and wanted == "last":
            why = "no unfinished run of this configuration has a checkpoint"
            raise CheckpointError("ckpt_path", "last", why, "start afresh without it, or use ckpt_path=auto")
    if run is not None and run.provenance().get("status") != "finished":
        _take_up(run, cfg)
    if wanted not in (None, "last", "auto"):
        return run, Path(wanted)
    if run is None or (not checkpoint_io.present(run.checkpoints) and wanted != "last"):
        return run, None
    return run, checkpoint_io.newest(run.checkpoints)


def _take_up(run: Run, cfg: DictConfig) -> None:
    """Hold the run's folder and repair it on rank 0; the others wait until that is done."""
    if _is_main():
        run_dir.take_up(run, cfg, "train")
        return
    deadline = time.monotonic() + 60
    while not checkpoint_io.is_settled(run.checkpoints) and time.monotonic() < deadline:
        time.sleep(0.1)


def _new_run(cfg: DictConfig) -> Run:
    if not _is_main():
        return _awaited(run_dir.chosen(cfg))
    run = run_dir.create(cfg, "train")
    os.environ[run_dir.ENVIRONMENT] = str(run.path)  # ranks that Lightning starts must not make another
    return run


def _judged_changes(cfg: DictConfig, run: Run | None, ckpt: Path | None) -> list[Change] | None:
    """Return what the configuration of a run that goes on changes, every key of it allowed; None for a new run.

    Raises:
        VitscopeError: a change that makes another experiment, or a limit below what is done.
    """
    if run is None:
        return None
    if cfg.get("ckpt_weights_only"):
        fix = "leave it out, or start a new run from the weights: leave out run= and name a file with ckpt_path="
        raise ConfigError("ckpt_weights_only", True, "a run that goes on needs the whole state of its checkpoint", fix)
    stored = run.config()
    changed = resume_changes.changes(stored, cfg)
    resume_changes.refuse_another_experiment(changed, stored, cfg, run)
    if ckpt is not None and any(change.key in ("trainer.max_epochs", "trainer.max_steps") for change in changed):
        epochs, steps = _done(ckpt)
        resume_changes.refuse_less_than_done(changed, cfg, epochs, steps)
    return changed


def _done(ckpt: Path) -> tuple[int, int]:
    """Return the epochs begun and the steps made."""
    content = checkpoint_io.read(ckpt)
    kept = checkpoint_io.facts(content, ckpt)
    return kept.get("epoch", 0) + (kept.get("batch", 0) > 0), int(content.get("global_step", 0))


def _step(ckpt: Path | None) -> int:
    return 0 if ckpt is None else _done(ckpt)[1]


def _goes_further(cfg: DictConfig, changed: Sequence[Change] | None, ckpt: Path) -> bool:
    """Tell whether a finished run has something left to train under limits that were changed."""
    if not any(
        change.key in ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time") for change in changed or ()
    ):
        return False
    epochs, steps = _done(ckpt)
    bounds = ((cfg.trainer.get("max_epochs"), epochs), (cfg.trainer.get("max_steps"), steps))
    return all(bound in (None, -1) or bound > done for bound, done in bounds)


def _say_nothing_to_do(run: Run, changed: Sequence[Change] | None) -> None:
    print(f"{run.path} is finished; nothing to do")
    if changed:
        keys = ", ".join(change.key for change in changed)
        _say(f"not applied, for no step is left to make: {keys}; measure it with analyze.py run={run.path}")


def _awaited(path: Path, seconds: float = 60.0) -> Run:
    deadline = time.monotonic() + seconds
    while not (path / "provenance.json").exists():
        if time.monotonic() > deadline:
            raise ConfigError("run_dir", path, "rank 0 made no run there", "see rank 0's error")
        time.sleep(0.1)
    return Run(path)


def _adopted(
    path: Path, network: Any, identity: Mapping[str, Any], run: Run, trainer: Any, *, weights_only: bool
) -> Path | None:
    """Return a checkpoint of ours to resume from; take the weights of any other file, or where only they are wanted.

    Returns:
        None where only the weights were taken.

    Raises:
        CheckpointError: it was made with another optimizer, batch size, seed, number of processes or of classes.
    """
    content = checkpoint_io.read(path)
    factories.load_weights(network, content, path)  # refuses another model's in one line
    if weights_only or "loops" not in content:
        return None
    kept = checkpoint_io.facts(content, path)
    for key, now in identity.items():
        if key == "optimizer" and kept.get(key, now) != now:
            why = "the checkpoint's own values (rate, decay, ...) would be used and these be passed over"
            command = resume_changes.weights_command(run, path.absolute(), {})
            raise CheckpointError(
                "optimizer", None, why, f"leave it as it was, or start from the weights alone: {command}"
            )
        if key in kept and kept[key] != now:
            name = {"world_size": "trainer.devices", "seed": "seed"}.get(key, f"data.{key}")
            raise CheckpointError(name, now, f"the checkpoint was made with {kept[key]}", f"use {key} {kept[key]}")
    checkpoint_schema.check(content, path, network, trainer)
    return path


def _is_main() -> bool:
    return all(int(os.environ.get(key, "0")) == 0 for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _say(line: str) -> None:
    if _is_main():
        print(line, file=sys.stderr, flush=True)
