"""``analyze.py``: measure a trained run, a checkpoint file, or any model."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vitscope.cli import exit_codes, hydra_command
from vitscope.config import loading
from vitscope.config.validation import validate_plain_values
from vitscope.runs import run_overrides

#: overrides of the run's own values, which the configuration that Hydra composes does not hold
_run_value_overrides: list[str] = []


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    _run_value_overrides.clear()
    if run_overrides.value_of(sys.argv[1:], "run") is not None:
        composed, inside = run_overrides.split(sys.argv[1:], run_overrides.RUN_GROUPS)
        _run_value_overrides.extend(inside)
        sys.argv = [sys.argv[0], *composed]
    hydra_command.uncaught(_composed)


@hydra.main(version_base="1.3", config_path=str(loading.folder()), config_name="analyze")
@hydra_command.kept_error
def _composed(cfg: DictConfig) -> None:
    if not cfg.run:
        validate_plain_values(cfg)
    from vitscope.analyses.analysis_run import analyze  # imports torch

    keys = [override.partition("=")[0] for override in HydraConfig.get().overrides.task]
    analyze(cfg, keys, _run_value_overrides)
