"""``train.py``: compose a configuration, or read the one of a run, and train it."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from vitscope.cli import exit_codes, hydra_overrides
from vitscope.config import loading
from vitscope.runs import (
    run_dir,
)
from vitscope.sweep import hydra_multirun
from vitscope.training.training_run import train

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
