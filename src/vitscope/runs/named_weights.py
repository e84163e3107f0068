"""Weights of a file that a command names: errors state the run whose file it is and where a number of classes comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitscope.config import cross_checks
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_weights
from vitscope.runs.run_dir import Run
from vitscope.runtime import safe_files
from vitscope.runtime.errors import CheckpointError


def load_named_weights(
    network: nn.Module, content: Mapping[str, Any], path: Path, cfg: DictConfig, *, average: bool = False
) -> None:
    """Put the weights of a named file into a network built from a configuration, see `checkpoint_weights.load_weights`.

    Args:
        network: The network whose weights are replaced.
        content: The contents of the file.
        path: The file.
        cfg: The configuration of the network and its data, for errors.
        average: Whether to take averages over training steps.

    Raises:
        ConfigError: The file names the classes in another order than the data.
        CheckpointError: They do not fit; where the file is a run's, the error names ``run=<folder>``, and where a training
            asks for another number of classes ``ckpt_head=new``.
    """
    if cfg.get("ckpt_head") != "new":
        cross_checks.check_class_order(cfg, content, path)
    source = cross_checks.source_of_class_count(cfg)
    try:
        checkpoint_weights.load_weights(network, content, path, average=average, class_count_source=source)
    except CheckpointError as error:
        counts = checkpoint_weights.class_counts(network, content, average=average)
        if counts is not None and "ckpt_head" in cfg and error.key == "ckpt_path":
            fix = f"ckpt_head=new trains a new classifier for {counts[1]} classes; or use the number it was made with"
            raise CheckpointError(error.key, error.value, error.why, fix) from error
        owner = run_dir.owner_of(path)
        if owner is None or error.key != "ckpt_path" or cfg.get("run"):
            raise
        fix = f"the file belongs to a run: use run={owner.path}, which takes that run's model and data"
        raise CheckpointError(error.key, error.value, error.why, fix) from error


def refuse_other_weights(network: nn.Module, path: Path, run: Run, tag: str | None = None) -> None:
    """Refuse weights of a file whose results in a run folder are of other weights: the file was replaced since.

    Args:
        network: Network that holds the weights.
        path: The file that they are from.
        run: The folder.
        tag: The name of the results, all of which are of one file's weights; None: some result has to be of these weights.

    Raises:
        CheckpointError: A result of this name is of other weights, or all results are.
    """
    weights = checkpoint_weights.weights_hash(network)
    measured = {name: stored for name, stored in _measured_weights(run, tag).items() if stored is not None}
    others = [name for name, stored in measured.items() if stored != weights]
    if others and (tag is not None or len(others) == len(measured)):
        reason = f"{run.path} holds results of other weights of this file ({others[0]}): it was replaced since"
        raise CheckpointError("ckpt_path", path, reason, "measure it in a new folder: ckpt_path= without run=")


def _measured_weights(run: Run, tag: str | None) -> dict[str, str | None]:
    """Return the hash of the weights of each result by its name, of one tag or of all."""
    hashes = {}
    for file in sorted(run.results.glob("*/*.json")):
        if tag is not None and file.stem.rpartition("-")[0] != tag:
            continue
        try:
            stored = json.loads(safe_files.read_text(file, safe_files.LARGEST))
        except ValueError:  # the result itself is in the file beside it
            continue
        card = stored.get("card") if isinstance(stored, dict) else None
        hashes[f"{file.parent.name}/{file.stem}"] = (card or {}).get("checkpoint")
    return hashes
