"""Weights of a file that a command names: errors state the run whose file it is and where a number of classes comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitscope.config import cross_checks
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_weights
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
