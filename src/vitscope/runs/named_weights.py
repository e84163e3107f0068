"""Weights of a file that a command names: errors state the run whose file it is and where a number of classes comes from."""

from __future__ import annotations

import glob
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
        network: its weights are replaced.
        content: the contents of the file.
        path: the file.
        cfg: the configuration of the network and its data, for errors.
        average: whether to take averages over training steps.

    Raises:
        CheckpointError: they do not fit; where the file is a run's, the error names ``run=<folder>``.
    """
    source = cross_checks.source_of_class_count(cfg)
    try:
        checkpoint_weights.load_weights(network, content, path, average=average, class_count_source=source)
    except CheckpointError as error:
        owner = run_dir.owner_of(path)
        if owner is None or error.key != "ckpt_path" or cfg.get("run"):
            raise
        fix = f"the file belongs to a run: use run={owner.path}, which takes that run's model and data"
        raise CheckpointError(error.key, error.value, error.why, fix) from error


def refuse_other_weights(network: nn.Module, path: Path, run: Run, tag: str) -> None:
    """Refuse weights under whose name a run folder holds results of other ones: the file was replaced since.

    Args:
        network: holds the weights.
        path: the file that they are from.
        run: the folder.
        tag: the name of the results.

    Raises:
        CheckpointError: a result of this name is of other weights.
    """
    weights = checkpoint_weights.weights_hash(network)
    for file in sorted(run.results.glob(f"*/{glob.escape(tag)}-*.json")):
        if file.stem.rpartition("-")[0] != tag:
            continue
        try:
            stored = json.loads(safe_files.read_text(file, safe_files.LARGEST))
        except ValueError:  # the result itself is in the file beside it
            continue
        measured = (stored.get("card") or {}).get("checkpoint") if isinstance(stored, dict) else None
        if measured is not None and measured != weights:
            reason = (
                f"{run.path} holds results of other weights of this file ({file.parent.name}): it was replaced since"
            )
            raise CheckpointError("ckpt_path", path, reason, "measure it in a new folder: ckpt_path= without run=")
