"""Resume point of a training: which run and checkpoint to go on with, and whether the configuration lets it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitscope.config import experiment_identity
from vitscope.runs import (
    checkpoint_io,
    checkpoint_schema,
    checkpoint_weights,
    resume_changes,
    run_dir,
)
from vitscope.runs.resume_changes import Change
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError, ConfigError
from vitscope.runtime.logging import is_main_process, notify


def find_resume_point(cfg: DictConfig, run: Run | None) -> tuple[Run | None, Path | None]:
    """Return the run to go on with and the checkpoint; no run: a new one, from a file's state where one is named."""
    wanted = cfg.ckpt_path
    if run is None and wanted in ("last", "auto"):
        run = run_dir.unfinished(Path(cfg.paths.runs), experiment_identity.config_hash(cfg))
        if run is None and wanted == "last":
            why = "no unfinished run of this configuration has a checkpoint"
            raise CheckpointError("ckpt_path", "last", why, "start afresh without it, or use ckpt_path=auto")
    if run is not None and run.provenance().get("status") != "finished":
        take_up_run(run, cfg)
    if wanted not in (None, "last", "auto"):
        return run, Path(wanted)
    if run is None or (not checkpoint_io.present(run.checkpoints) and wanted != "last"):
        return run, None
    return run, checkpoint_io.newest(run.checkpoints)


def take_up_run(run: Run, cfg: DictConfig) -> None:
    """Hold the run's folder and repair it on rank 0; the others wait until that is done."""
    if is_main_process():
        run_dir.take_up(run, cfg, "train")
        return
    deadline = time.monotonic() + 60
    while not checkpoint_io.is_settled(run.checkpoints) and time.monotonic() < deadline:
        time.sleep(0.1)


def judge_changes(cfg: DictConfig, run: Run | None, ckpt: Path | None) -> list[Change] | None:
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


def step_of(ckpt: Path | None) -> int:
    """Return the optimizer steps that a checkpoint has made; 0 without one."""
    return 0 if ckpt is None else _done(ckpt)[1]


def has_steps_left(cfg: DictConfig, changed: Sequence[Change] | None, ckpt: Path) -> bool:
    """Tell whether a finished run has something left to train under limits that were changed."""
    if not any(
        change.key in ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time") for change in changed or ()
    ):
        return False
    epochs, steps = _done(ckpt)
    bounds = ((cfg.trainer.get("max_epochs"), epochs), (cfg.trainer.get("max_steps"), steps))
    return all(bound in (None, -1) or bound > done for bound, done in bounds)


def report_nothing_to_do(run: Run, changed: Sequence[Change] | None) -> None:
    """Say that the run is finished, and which changes of its configuration are therefore not applied."""
    print(f"{run.path} is finished; nothing to do")
    if changed:
        keys = ", ".join(change.key for change in changed)
        notify(f"not applied, for no step is left to make: {keys}; measure it with analyze.py run={run.path}")


def adopt_checkpoint(
    path: Path, network: Any, identity: Mapping[str, Any], run: Run, trainer: Any, *, weights_only: bool
) -> Path | None:
    """Return a checkpoint of ours to resume from; take the weights of any other file, or where only they are wanted.

    Returns:
        None where only the weights were taken.

    Raises:
        CheckpointError: it was made with another optimizer, batch size, seed, number of processes or of classes.
    """
    content = checkpoint_io.read(path)
    checkpoint_weights.load_weights(network, content, path)  # refuses another model's in one line
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
