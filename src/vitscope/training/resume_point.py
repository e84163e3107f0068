"""Find the run and the checkpoint that a training resumes from, and check that its configuration allows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.optim import Optimizer

from vitscope.config import experiment_identity
from vitscope.models import classifier_head
from vitscope.runs import named_weights, resume_changes, run_dir, run_search
from vitscope.runs.checkpoints import checkpoint_content, checkpoint_io, checkpoint_schema, checkpoint_weights
from vitscope.runs.resume_changes import Change
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError, ConfigError
from vitscope.runtime.logging import is_main_process

_logger = logging.getLogger(__name__)

#: the value of ``ckpt`` by which the weights of a file are meant, not its averages
LATEST = "last"
#: values of ``ckpt_head``: the classifier of the file, or a newly initialized one
FILE_HEAD, NEW_HEAD = "file", "new"


@dataclass(frozen=True)
class ResumePoint:
    """The run and the checkpoint that a training starts from.

    Attributes:
        run: Run to resume; None for a new one.
        checkpoint: File to read; None to start from initial weights.
        changes: Changes of the run's configuration, all of them allowed; None for a new run.
        is_finished: Whether the run is finished and the changed limits leave no step to make.
    """

    run: Run | None
    checkpoint: Path | None
    changes: list[Change] | None
    is_finished: bool


def find_resume_point(cfg: DictConfig, run: Run | None) -> ResumePoint:
    """Return what a training starts from, and hold the folder of a run that is not finished.

    Args:
        cfg: Validated configuration; its ``ckpt_path`` is ``last``, ``auto``, a file or None.
        run: Run named on the command line; None looks for one where ``ckpt_path`` asks for it.

    Raises:
        CheckpointError: ``ckpt_path=last`` and no unfinished run of this configuration.
        VitscopeError: A change that makes another experiment, or a limit below what is done.
    """
    run = _run_to_resume(cfg, run)
    if run is not None and run.provenance().get("status") != "finished":
        take_up_run(run, cfg)
    checkpoint = _checkpoint_to_read(cfg, run)
    changes = allowed_changes(cfg, run, checkpoint)
    is_finished = False
    if run is not None and checkpoint is not None and run.provenance().get("status") == "finished":
        is_finished = not has_steps_left(cfg, changes, checkpoint)
    return ResumePoint(run, checkpoint, changes, is_finished)


def forget_start_file(cfg: DictConfig, run: Run) -> None:
    """Let a run that has checkpoints resume from them, not from the file that it once started from, in place.

    Args:
        cfg: The run's stored configuration, before any override.
        run: The run.
    """
    if not checkpoint_io.present(run.checkpoints):
        return
    for key, value in (("ckpt_path", None), ("ckpt", LATEST), ("ckpt_weights_only", False), ("ckpt_head", FILE_HEAD)):
        if key in cfg:
            cfg[key] = value


def _run_to_resume(cfg: DictConfig, run: Run | None) -> Run | None:
    if run is not None or cfg.ckpt_path not in ("last", "auto"):
        return run
    run = run_search.unfinished(Path(cfg.paths.runs), experiment_identity.config_hash(cfg))
    if run is None and cfg.ckpt_path == "last":
        reason = "no unfinished run of this configuration has a checkpoint"
        raise CheckpointError("ckpt_path", "last", reason, "start a new run without it, or use ckpt_path=auto")
    return run


def _checkpoint_to_read(cfg: DictConfig, run: Run | None) -> Path | None:
    if cfg.ckpt_path not in (None, "last", "auto"):
        return Path(cfg.ckpt_path)
    if run is None or (not checkpoint_io.present(run.checkpoints) and cfg.ckpt_path != "last"):
        return None
    return checkpoint_io.newest(run.checkpoints)


def take_up_run(run: Run, cfg: DictConfig) -> None:
    """Hold the run's folder and repair it on rank 0; the other ranks wait until that is done."""
    if is_main_process():
        run_dir.reopen(run, cfg, "train")
        return
    deadline = time.monotonic() + 60
    while not checkpoint_io.is_settled(run.checkpoints) and time.monotonic() < deadline:
        time.sleep(0.1)


def allowed_changes(cfg: DictConfig, run: Run | None, checkpoint: Path | None) -> list[Change] | None:
    """Return the changes of a resumed run's configuration, all of them allowed; None for a new run.

    Raises:
        VitscopeError: A change that makes another experiment, or a limit below what is done.
    """
    if run is None:
        return None
    starts_anew = not checkpoint_io.present(run.checkpoints)  # it ended before its first checkpoint
    if cfg.get("ckpt", LATEST) == checkpoint_weights.AVERAGE and not starts_anew:
        fix = "leave it out, or start a new run from the averages: leave out run= and name a file with ckpt_path="
        raise ConfigError("ckpt", cfg.ckpt, "a resumed run needs the weights that its optimizer trains", fix)
    if cfg.get("ckpt_weights_only") and not starts_anew:
        fix = "leave it out, or start a new run from the weights: leave out run= and name a file with ckpt_path="
        raise ConfigError("ckpt_weights_only", True, "a resumed run needs the whole state of its checkpoint", fix)
    if cfg.get("ckpt_head", FILE_HEAD) == NEW_HEAD and not starts_anew:
        fix = "leave it out, or start a new run from the weights: leave out run= and name a file with ckpt_path="
        raise ConfigError("ckpt_head", NEW_HEAD, "a resumed run needs the whole state of its checkpoint", fix)
    stored = run.config()
    changes = resume_changes.changes(stored, cfg)
    resume_changes.refuse_another_experiment(changes, stored, cfg, run)
    if checkpoint is not None and any(change.key in ("trainer.max_epochs", "trainer.max_steps") for change in changes):
        n_epochs, n_steps = _progress(checkpoint)
        resume_changes.refuse_less_than_done(changes, cfg, n_epochs, n_steps)
    return changes


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Return the number of epochs that have begun and of optimizer steps that are made at a checkpoint."""
    return _progress_of(checkpoint_io.read(checkpoint), checkpoint)


def _progress_of(content: Mapping[str, Any], checkpoint: Path) -> tuple[int, int]:
    facts = checkpoint_content.facts(content, checkpoint)
    return facts.get("epoch", 0) + (facts.get("batch", 0) > 0), checkpoint_content.completed_steps(content)


def has_steps_left(cfg: DictConfig, changes: Sequence[Change] | None, checkpoint: Path) -> bool:
    """Tell whether changed limits leave steps to make in a finished run."""
    if not any(
        change.key in ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time") for change in changes or ()
    ):
        return False
    return _is_below_limits(cfg, _progress(checkpoint))


def _is_below_limits(cfg: DictConfig, progress: tuple[int, int]) -> bool:
    """Tell whether the epochs and steps of a checkpoint are fewer than the training's limits."""
    n_epochs, n_steps = progress
    limits = ((cfg.trainer.get("max_epochs"), n_epochs), (cfg.trainer.get("max_steps"), n_steps))
    return all(limit in (None, -1) or limit > count for limit, count in limits)


def report_nothing_to_do(run: Run, changes: Sequence[Change] | None) -> None:
    """Print that the run is finished, and which changes of its configuration are therefore not applied."""
    print(f"{run.path} is finished; nothing to do")
    if changes:
        keys = ", ".join(change.key for change in changes)
        _logger.info(
            f"no training step is left, so that these keys have no effect: {keys}; measure with analyze.py run={run.path}"
        )


def check_choice_of_weights(cfg: DictConfig) -> None:
    """Check ``ckpt``, the weights or the averages of the file that ``ckpt_path`` names, and ``ckpt_head``.

    Raises:
        ConfigError: Another value, or averages or a new classifier where no file is named.
    """
    head = cfg.get("ckpt_head", FILE_HEAD)
    if head not in (FILE_HEAD, NEW_HEAD):
        raise ConfigError(
            "ckpt_head", head, f"neither {FILE_HEAD} nor {NEW_HEAD}", f"set ckpt_head={NEW_HEAD}, or leave it out"
        )
    if head == NEW_HEAD and cfg.ckpt_path in (None, "last", "auto"):
        reason = "replaces the classifier of the file in ckpt_path, but ckpt_path names no file"
        raise ConfigError("ckpt_head", head, reason, "set ckpt_path=<file>, or leave it out")
    chosen_weights = cfg.get("ckpt", LATEST)
    if chosen_weights not in (LATEST, checkpoint_weights.AVERAGE):
        fix = f"choose {LATEST} or {checkpoint_weights.AVERAGE}; run=<folder> ckpt_path=last resumes a run"
        raise ConfigError("ckpt", chosen_weights, "no weights of a file that a training starts from", fix)
    if chosen_weights == checkpoint_weights.AVERAGE and cfg.ckpt_path in (None, "last", "auto"):
        reason = "loads the averages of the file in ckpt_path, but ckpt_path names no file"
        raise ConfigError("ckpt", chosen_weights, reason, "set ckpt_path=<file>, or leave it out")


def takes_weights_only(cfg: DictConfig) -> bool:
    """Tell whether a new run takes nothing but weights from its file: averages and a new classifier have no optimizer's state."""
    return (
        bool(cfg.get("ckpt_weights_only"))
        or cfg.get("ckpt", LATEST) == checkpoint_weights.AVERAGE
        or cfg.get("ckpt_head", FILE_HEAD) == NEW_HEAD
    )


def load_start_weights(cfg: DictConfig, network: Any, path: Path) -> Mapping[str, Any]:
    """Put the weights of the file that a new run starts from into its network, before a folder is made.

    Returns:
        The contents of the file, with the network's own classifier where the configuration asks for a new one.

    Raises:
        CheckpointError: They do not fit.
        ConfigError: The file's training has made every step that this configuration asks for, or the network has no classifier.
    """
    content: Mapping[str, Any] = checkpoint_io.read(path)
    if cfg.get("ckpt_head", FILE_HEAD) == NEW_HEAD:
        content = _with_new_head(cfg, network, content, path)
    average = cfg.get("ckpt", LATEST) == checkpoint_weights.AVERAGE
    named_weights.load_named_weights(network, content, path, cfg, average=average)
    if takes_weights_only(cfg) or "loops" not in content:
        return content
    owner, n_steps = run_dir.owner_of(path), checkpoint_content.completed_steps(content)
    resumed = f"run={owner.path} resumes that run itself, " if owner is not None else ""
    if not _is_below_limits(cfg, _progress_of(content, path)):
        reason = f"no training step is left: ckpt_path={path} holds a training of {n_steps} steps"
        fix = f"raise it; {resumed}ckpt_weights_only=true starts a new training from its weights"
        raise ConfigError("trainer.max_epochs", cfg.trainer.get("max_epochs"), reason, fix)
    if owner is not None:
        _logger.info(
            f"ckpt_path={path}: a new run continues from step {n_steps} with the optimizer's state; {resumed}"
            "ckpt_weights_only=true loads the weights only"
        )
    return content


def _with_new_head(cfg: DictConfig, network: Any, content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the contents of a file with the network's own classifier, and say what was left out."""
    num_classes = int(cfg.data.num_classes)
    try:
        replaced = classifier_head.with_new_head(network, content, num_classes)
    except ValueError as error:
        raise ConfigError("ckpt_head", NEW_HEAD, str(error).rstrip("."), "leave it out") from None
    left_out = [f"{name} {shape}" for name, shape in replaced.left_out.items()]
    of_file = f"left out {', '.join(left_out[:4])}" if left_out else "the file has none"
    more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
    _logger.info(
        f"ckpt_path={path}: new classifier for {num_classes} classes ({', '.join(replaced.new_names)}); {of_file}{more}"
    )
    return replaced.content


def adopt_checkpoint(
    path: Path,
    network: Any,
    identity: Mapping[str, Any],
    run: Run,
    trainer: Any,
    *,
    optimizer: Optimizer | None = None,
    weights_only: bool,
    average: bool = False,
    content: Mapping[str, Any] | None = None,
) -> tuple[Path | None, int]:
    """Load the weights of a file, and return it if training resumes from its whole state.

    Args:
        path: Checkpoint of this package, or a file of weights.
        network: Network whose weights are replaced.
        identity: Facts of this training that the checkpoint's have to equal: batch size, number of processes, ...
        run: Run folder, for the command that the error suggests.
        trainer: Trainer whose callbacks read their state from the checkpoint.
        optimizer: New optimizer, whose groups of parameters the checkpoint's have to equal; None for one group of all.
        weights_only: Whether to take nothing but the weights.
        average: Whether these are averages over training steps.
        content: Contents of the file, where it has been read.

    Returns:
        ``path`` and the number of optimizer steps that are made in it; None and 0 where only the weights were loaded.

    Raises:
        CheckpointError: It was written with another optimizer, batch size, seed, number of processes or of classes.
    """
    content = checkpoint_io.read(path) if content is None else content
    # refuses another model's in one line
    checkpoint_weights.load_weights(network, content, path, average=average, report=False)
    if weights_only or "loops" not in content:
        return None, 0
    stored = checkpoint_content.facts(content, path)
    for key, value in identity.items():
        if key == "optimizer" and stored.get(key, value) != value:
            reason = "the values in the checkpoint (learning rate, weight decay, ...) would be used and these ignored"
            command = resume_changes.weights_command(run, path.absolute(), {})
            raise CheckpointError(
                "optimizer", None, reason, f"leave it as it was, or start from the weights alone: {command}"
            )
        if key in stored and stored[key] != value:
            name = {"world_size": "trainer.devices", "seed": "seed"}.get(key, f"data.{key}")
            raise CheckpointError(
                name, value, f"the checkpoint was made with {stored[key]}", f"use {key} {stored[key]}"
            )
    checkpoint_schema.check(content, path, network, trainer, optimizer)
    return path, checkpoint_content.completed_steps(content)
