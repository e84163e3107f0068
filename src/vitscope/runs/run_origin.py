"""Origin of a run: the command that makes it, the commit of the code, the versions of packages, machine, device and seed."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitscope.config import experiment_identity
from vitscope.core.objective_card import versions
from vitscope.runtime import redaction


def facts(cfg: DictConfig, command: str) -> Mapping[str, Any]:
    """Return the origin of a run, as ``provenance.json`` states it: command, commit, versions, machine, device and seed.

    Args:
        cfg: Configuration of the run.
        command: Command that makes it.
    """
    return {
        "command": command,
        "arguments": [redaction.cleaned(argument) for argument in sys.argv[1:]],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config_hash": experiment_identity.config_hash(cfg),
        "git_commit": _git_commit(),
        "versions": {**versions(), "pytorch_lightning": _version("pytorch_lightning"), "wandb": _version("wandb")},
        "host": platform.node(),
        "device": _device(cfg),
        "seed": cfg.get("seed"),
    }


def _device(cfg: DictConfig) -> str:
    """Return the name of the GPU on which the run computes, or ``mps`` or ``cpu``."""
    import torch  # a command that refuses its arguments does not load it

    accelerators = {str(cfg.get("device")), str(OmegaConf.select(cfg, "trainer.accelerator"))}
    if "cpu" not in accelerators and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if "mps" in accelerators else "cpu"


def _git_commit() -> str | None:
    with contextlib.suppress(OSError):  # a container without git
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return git.stdout.strip() or None
    return None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package.replace("_", "-"))
