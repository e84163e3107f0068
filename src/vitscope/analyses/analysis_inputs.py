"""Inputs of an analysis command: the configuration with the run's values, the checkpoint, the network and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from vitscope.analyses.recorded_normalization import note_other_normalization
from vitscope.config import caps, cross_checks, factories, loading
from vitscope.config.keys import common_probe
from vitscope.config.validation import validate
from vitscope.runs import named_weights, run_dir, run_lock, run_overrides
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest, checkpoint_weights
from vitscope.runs.checkpoints.checkpoint_weights import AVERAGE
from vitscope.runs.run_dir import Run
from vitscope.runtime import errors
from vitscope.runtime.distributed import rank, world_size
from vitscope.runtime.errors import CheckpointError, ConfigError, StorageError

#: checkpoints that a training writes again and again
CHANGING = ("last", "best")


@dataclass(frozen=True)
class AnalysisInputs:
    """Inputs of an analysis command, read before there is a folder for its results.

    Attributes:
        cfg: Validated configuration, with the run's values.
        run: The run that the command names; None without one.
        network: The network on its device, with its weights.
        data: The data module.
        content: Contents of the checkpoint; None for a network that is measured as it was built.
        path: File of the checkpoint; None without one.
        defaults: Groups whose values are the defaults for a checkpoint without a run.
    """

    cfg: DictConfig
    run: Run | None
    network: nn.Module
    data: Any
    content: Mapping[str, Any] | None
    path: Path | None
    defaults: Sequence[str]


def prepare_inputs(cfg: DictConfig, chosen_keys: Sequence[str], run_value_overrides: Sequence[str]) -> AnalysisInputs:
    """Return the configuration with the run's values, validated, and the network and data that it names.

    Args:
        cfg: Composed configuration of ``conf/analyze.yaml``.
        chosen_keys: Keys and groups that the command line set; they win over the run's.
        run_value_overrides: Dotted overrides of the run's groups.

    Raises:
        VitscopeError: Invalid values, or a run, checkpoint or device that is not there.
    """
    run = run_dir.find(str(cfg.run)) if cfg.run else None
    if run is not None:
        _refuse_second_file(cfg, run)
        _refuse_training_values(run_value_overrides)
        cfg = merge_run_values(cfg, run.config(), chosen_keys)
        _take_measured_file(cfg, run, chosen_keys)
        run_overrides.apply(cfg, run_value_overrides)
        _refuse_new_name(cfg)
        _refuse_changing_checkpoint(_checkpoint_path(cfg, run), run)
    common_probe.apply_common_probe(cfg, chosen_keys)
    defaults = common_probe.apply_checkpoint_defaults(cfg, chosen_keys)
    caps.apply_caps(cfg)
    validate(cfg)
    cross_checks.settle_class_counts(cfg)
    device = _device(cfg.device)
    path, content = _checkpoint(cfg, run)
    network = factories.model(cfg)
    if run is None:
        network = _with_settled_classes(cfg, network, path, content)
    if path is not None and content is not None:
        named_weights.load_named_weights(network, content, path, cfg, average=cfg.ckpt == AVERAGE)
    data = factories.data(cfg)
    data.adapt_to(network)
    if run is None and rank() == 0:
        note_other_normalization(cfg, network, chosen_keys, path is not None)
    return AnalysisInputs(cfg, run, network.to(device), data, content, path, defaults)


def merge_run_values(cfg: DictConfig, base: DictConfig, chosen_keys: Sequence[str]) -> DictConfig:
    """Return ``cfg`` with the run's model, data, objective and seed, except where the command line chose another."""
    merged_cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    assert isinstance(merged_cfg, DictConfig)
    with open_dict(merged_cfg):
        for key in (*run_overrides.RUN_GROUPS, "seed"):
            if key not in chosen_keys and key in base:
                merged_cfg[key] = base[key]
        merged_cfg.objective.setdefault("loss", loading.DEFAULT_LOSS)  # of an earlier run
        if "objective" in chosen_keys and "data" not in chosen_keys:
            # the run's data node was saved with the recipe of its own objective written in
            for key, value in merged_cfg.objective.items():
                if key in merged_cfg.data:
                    merged_cfg.data[key] = value
    return merged_cfg


def _refuse_second_file(cfg: DictConfig, run: Run) -> None:
    """Refuse ``ckpt_path`` beside ``run``: both name weights.

    Raises:
        ConfigError: Saying how the file is measured.
    """
    if cfg.ckpt_path:
        reason = f"run={run.path} names the weights already"
        fix = (
            "set ckpt=<name> for another checkpoint of the run, or leave out run= and name model= and data= of the file"
        )
        raise ConfigError("ckpt_path", cfg.ckpt_path, reason, fix)


def _refuse_training_values(run_value_overrides: Sequence[str]) -> None:
    """Refuse values of a run that only its training uses: an analysis would pass them over in silence.

    Raises:
        ConfigError: Naming the key and what an analysis has in its place.
    """
    for override in run_value_overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key.partition(".")[0] == "optimizer":
            reason = "an analysis takes the optimizer as the run's checkpoint holds it"
            raise ConfigError(key, value, reason, "leave it out; preconditioned_sharpness has lr= of its own")
        if key == "data.batch_size":
            fix = "set data.eval_batch_size, or analysis.<name>.probe.batch_size"
            raise ConfigError(key, value, "a setting of training batches, which analyses do not use", fix)


def _take_measured_file(cfg: DictConfig, run: Run, overrides: Sequence[str]) -> None:
    """Let a folder that analyze.py made for a file of weights measure that file again, in place.

    Raises:
        CheckpointError: ``ckpt`` names a checkpoint, of which the folder has none.
    """
    measured_file = run.measured_file()
    if measured_file is None:
        return
    if cfg.ckpt not in ("last", AVERAGE):
        reason = f"{run.path} holds results of one file, {measured_file[0]}, and no checkpoints"
        raise CheckpointError("ckpt", cfg.ckpt, reason, "leave it out; ckpt=ema loads the averages in the file")
    cfg.ckpt_path = str(measured_file[0])
    if not any(override.lstrip("+").partition("=")[0] == "ckpt" for override in overrides):
        cfg.ckpt = measured_file[1]


def _refuse_new_name(cfg: DictConfig) -> None:
    """Refuse a name and tags where results go into a run's folder, which has its own.

    Raises:
        ConfigError: Naming the key.
    """
    for key in ("name", "tags"):
        if cfg.get(key):
            reason = "the results go into the run's folder, which has its own"
            raise ConfigError(key, loading.plain(cfg[key]), reason, f"leave it out, or set logger.{key} for W&B alone")


def _checkpoint_path(cfg: DictConfig, run: Run) -> Path:
    """Return the file of weights that the command names in a run; averages are in the last checkpoint."""
    if cfg.ckpt_path:  # of a folder that analyze.py made for a file
        return Path(cfg.ckpt_path)
    if Path(str(cfg.run)).is_file():
        return Path(str(cfg.run))
    return run.checkpoints / f"{'last' if cfg.ckpt == AVERAGE else cfg.ckpt}.ckpt"


def _refuse_changing_checkpoint(path: Path, run: Run) -> None:
    """Refuse a checkpoint that a training, alive in this or another machine's process, writes again and again.

    Its result would stand under the name of the trained network's.

    Raises:
        StorageError: Naming the process.
    """
    holder = run_lock.living_holder(run.path)
    if holder is None or path.stem not in CHANGING:
        return
    reason = f"{holder} trains in this folder, and {path.name} is not yet what it will be at the end"
    fixed = [
        Path(name).stem for name in checkpoint_manifest.entries(run.checkpoints) if Path(name).stem not in CHANGING
    ]
    instead = f", or measure a checkpoint that stays as it is: ckpt={fixed[-1]}" if fixed else ""
    raise StorageError("run", run.path, reason, f"wait until it ends{instead}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", name, "no such device", "choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", name, "this machine has no GPU", "set device=cpu")
    if device.type == "meta" or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError("device", name, "no such device", "choose auto, cpu or cuda")
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", torch.cuda.current_device())  # the rank's own
    return device


def _checkpoint(cfg: DictConfig, run: Run | None) -> tuple[Path | None, Mapping[str, Any] | None]:
    """Return the file of weights that the command names and its contents; a model without any is measured as it was built."""
    if run is not None:
        path = _checkpoint_path(cfg, run)
    elif cfg.ckpt_path:
        path = Path(cfg.ckpt_path)
        if cfg.ckpt not in ("last", AVERAGE):
            reason = "names a checkpoint of a run, and ckpt_path names a file"
            raise ConfigError("ckpt", cfg.ckpt, reason, f"leave it out, or set ckpt={AVERAGE} for its averages")
    else:
        if cfg.ckpt != "last":
            raise ConfigError(
                "ckpt",
                cfg.ckpt,
                "names a checkpoint of a run, but run= is not set",
                "set run=<folder>, or name a file with ckpt_path=",
            )
        return None, None
    if run is not None and not path.is_file():
        names = [Path(name).stem for name in checkpoint_manifest.entries(run.checkpoints)]
        if cfg.ckpt_path:
            fix = "put the file back, or measure it where it is: ckpt_path= without run="
            raise CheckpointError("ckpt_path", path, f"{run.path} measured this file, and it is no longer there", fix)
        if not names and not run.checkpoints.exists():
            return None, None  # a folder that analyze.py made for a model without a checkpoint
        raise CheckpointError("ckpt", cfg.ckpt, "the run has no such checkpoint", errors.nearest(str(cfg.ckpt), names))
    return path, checkpoint_io.read(path)


def _with_settled_classes(
    cfg: DictConfig, network: nn.Module, path: Path | None, content: Mapping[str, Any] | None
) -> nn.Module:
    """Return a network of another package that is not told its number of classes with that of its checkpoint or of the data.

    Raises:
        CheckpointError: The checkpoint's number is another one than the data's.
    """
    if content is None:
        return factories.model(cfg) if cross_checks.settle_own_network(cfg) else network
    if "num_classes" in cfg.model:  # loading names what does not fit
        return network
    counts = checkpoint_weights.class_counts(network, content, average=cfg.ckpt == AVERAGE)
    told_cfg = cfg.copy()
    if counts is None and cross_checks.settle_own_network(told_cfg):  # it fits the network's own default
        network = factories.model(told_cfg)
        counts = checkpoint_weights.class_counts(network, content, average=cfg.ckpt == AVERAGE)
    if counts is None:
        return network
    if counts[0] != cfg.data.num_classes:
        reason = f"it was made for {counts[0]} classes, {cross_checks.source_of_class_count(cfg)}"
        raise CheckpointError("ckpt_path", path, reason, "use the data that it was made for, or another checkpoint")
    return factories.model(cfg) if cross_checks.settle_own_network(cfg, counts[0]) else network
