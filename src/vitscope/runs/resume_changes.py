"""Judges what a resumed run's configuration changes: a table of the keys that may, a refusal for every other one, a record.

A key may change on a resume where no step that was made would have been another: limits of the training, devices, logging,
diagnostics, callbacks that only observe, workers and paths. Everything else makes another experiment.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitscope.config import experiment_identity, loading
from vitscope.runs import run_dir
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write
from vitscope.runtime.errors import CheckpointError, ConfigError

#: keys that say how a command starts, not what a run is: those of the command that made the run stay written down
INVOCATION = ("run", "run_dir", "ckpt", "ckpt_path", "ckpt_weights_only", "ckpt_head", "skip_finished")

#: regular expressions of the keys that may change on a resume, with the reason
CHANGEABLE = {
    r"trainer\.(max_epochs|max_steps|max_time)": "limits of the training, which may not fall below what is done",
    r"trainer\.(accelerator|devices|num_nodes|strategy\.timeout_s)": "devices; the number of processes is checked by itself",
    r"trainer\.(log_every_n_steps|enable_progress_bar|enable_model_summary|profiler)(\..*)?": "logging and progress",
    r"logger(\..*)?": "logging",
    r"tags": "words by which runs are found",
    r"probe(\..*)?": "images of diagnostics",
    r"analysis(\..*)?": "diagnostics, which leave no trace in training",
    r"test": "whether the trained network is tested",
    r"callbacks\.\w+\.(every_n_epochs|snapshots|warmup_epochs|warmup_steps|init)": "which checkpoints are kept",
    r"data\.(num_workers|root)": "workers and paths",
    r"paths\..*": "paths",
    r"(caps|profile|experiment)(\..*)?": "names of groups; the values that they set are judged by their own keys",
}

#: callbacks that only observe: any of their keys may change, and they may come and go
OBSERVERS = (
    "LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor", "ModelSummary", "RichModelSummary", "RichProgressBar",
    "TQDMProgressBar",
)  # fmt: skip
_CHECKPOINTS = "Checkpoints"

#: keys whose value a checkpoint holds, or that its state depends on: refused as a checkpoint that does not fit (exit code 4)
_HELD_BY_CHECKPOINT = ("optimizer", "data.batch_size", "data.num_classes")

#: 1 is one batch here and 1.0 all of them
_BY_TYPE = re.compile(r"trainer\.(limit_\w+_batches|overfit_batches|val_check_interval)")


@dataclass(frozen=True)
class Change:
    """A key with the value that the run was made with and the one that it goes on with; None for no such key."""

    key: str
    old: Any
    new: Any


def changes(stored: DictConfig, cfg: DictConfig) -> list[Change]:
    """Return where a configuration differs from a run's stored one, key by key; secrets and commands' own keys left out."""
    old, new = loading.plain(run_dir.redacted(stored)), loading.plain(run_dir.redacted(cfg))
    for tree in (old, new):
        tree["objective"] = loading.without_default_loss(tree.get("objective"))
        for key in INVOCATION:
            tree.pop(key, None)
        if isinstance(tree.get("model"), dict):
            for key in loading.MODEL_HINTS:
                tree["model"].pop(key, None)  # stated of the model and not passed to it
    return list(_differences(old, new, ""))


def refuse_another_experiment(changes: Sequence[Change], stored: DictConfig, cfg: DictConfig, run: Run) -> None:
    """Refuse changes of keys that may not change on a resume.

    Raises:
        CheckpointError: A key whose value the run's checkpoints hold: the optimizer, the batch size, the classes.
        ConfigError: Another one. Each names the key, the stored and the received value.
    """
    refused = [change for change in changes if not _is_changeable(change.key, stored, cfg)]
    refused.sort(key=lambda change: not _is_held(change.key))
    if not refused:
        return
    first, *others = refused
    reason = f"the run was made with {first.old}, and another value is another experiment"
    if others:
        reason += f" (as is {', '.join(change.key for change in others)})"
    error = CheckpointError if _is_held(first.key) else ConfigError
    raise error(first.key, first.new, reason, f"leave it at {first.old}, or start a new run: {_new_run(run, refused)}")


def refuse_less_than_done(changes: Sequence[Change], cfg: DictConfig, epochs: int, steps: int) -> None:
    """Refuse a limit of the training below what is done.

    Args:
        changes: The changes.
        cfg: The configuration to go on with.
        epochs: Epochs begun.
        steps: Optimizer steps made.

    Raises:
        ConfigError: With the key, the value and what is done.
    """
    progress = {"trainer.max_epochs": (epochs, "epochs"), "trainer.max_steps": (steps, "steps")}
    for change in changes:
        if change.key not in progress:
            continue
        least, unit = progress[change.key]
        if isinstance(change.new, int) and 0 <= change.new < least:
            reason = f"the run was made with {change.old}, and {least} {unit} have been started"
            raise ConfigError(change.key, change.new, reason, f"give at least {least}")


def record(run: Run, cfg: DictConfig, changes: Sequence[Change], step: int) -> None:
    """Write what changed to ``provenance.json`` and the configuration that holds from now on to ``config.yaml``.

    Args:
        run: The run that is resumed.
        cfg: Configuration of the run from now on.
        changes: The changes.
        step: The optimizer step from which they hold.
    """
    run_config = run.config()
    now = DictConfig(loading.plain(run_dir.redacted(cfg)))
    for key in INVOCATION:
        now.pop(key, None)
        if key in run_config:
            now[key] = run_config[key]
    noted = run.provenance().get("changes")
    earlier = noted if isinstance(noted, list) else []
    rows = [{"step": step, "key": change.key, "old": change.old, "new": change.new} for change in changes]
    every = [*earlier, *(row for row in rows if row not in earlier)]
    facts: dict[str, Any] = {"changes": every} if every else {}
    # a process of another rank that reads the new configuration has to find a run that goes on
    run.note(status="running", config_hash=experiment_identity.config_hash(cfg), **facts)
    if changes:
        atomic_write.write_atomically(run.path / "config.yaml", OmegaConf.to_yaml(now).encode())


def weights_command(run: Run, ckpt: Path, overrides: Mapping[str, Any]) -> str:
    """Return the command that starts a new run from a checkpoint's weights alone, with other values of some keys."""
    return _command(run, {"ckpt_path": ckpt, "ckpt_weights_only": "true", **overrides})


def _new_run(run: Run, refused: Sequence[Change]) -> str:
    values = {change.key: change.new for change in refused}
    last = run.checkpoints / "last.ckpt"
    if any(_is_held(change.key) for change in refused) and last.is_file():
        return f"from its weights alone, {weights_command(run, last, values)}"
    return _command(run, values)


def _command(run: Run, overrides: Mapping[str, Any]) -> str:
    """Return ``train.py`` with the overrides that the run was made with, some replaced."""
    noted = run.provenance().get("arguments")
    original_arguments = [str(argument) for argument in noted] if isinstance(noted, list) else []
    arguments = [a for a in original_arguments if a.lstrip("+~").partition("=")[0] not in {*INVOCATION, *overrides}]
    added = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    return "python train.py " + shlex.join([*arguments, *added])


def _differences(old: Any, new: Any, key: str) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new or (type(old) is not type(new) and _BY_TYPE.fullmatch(key)):
        yield Change(key, old, new)


def _is_held(key: str) -> bool:
    return any(key == held or key.startswith(f"{held}.") for held in _HELD_BY_CHECKPOINT)


def _is_changeable(key: str, stored: DictConfig, cfg: DictConfig) -> bool:
    if key.startswith("callbacks."):
        node = ".".join(key.split(".")[:2])
        kinds = {_kind(tree, node) for tree in (stored, cfg)} - {None}
        if all(kind in OBSERVERS for kind in kinds):
            return True
        if kinds != {_CHECKPOINTS}:
            return False
    return any(re.fullmatch(pattern, key) for pattern in CHANGEABLE)


def _kind(tree: DictConfig, node: str) -> str | None:
    target = OmegaConf.select(tree, f"{node}._target_", default=None)
    return None if target is None else str(target).rpartition(".")[2]
