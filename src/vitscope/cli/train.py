"""``train.py``: compose a configuration, or read the one of a run, and train it.

Torch and Lightning are imported only after the configuration was composed and its plain values were checked, so that
``--help`` and a refused override answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vitscope.cli import exit_codes, hydra_command, other_tools
from vitscope.config.keys import common_probe
from vitscope.config.loss import loss_overrides
from vitscope.config.validation import validate_plain_values
from vitscope.runs import run_overrides
from vitscope.sweep import hydra_multirun

#: metric of a job that is returned to Hydra's sweepers that learn
METRIC = "val/accuracy"


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    argv = loss_overrides.joined(sys.argv[1:])
    if hydra_command.answered("train", argv):
        return
    other_tools.refuse_foreign_names("train", argv)
    named = run_overrides.value_of(argv, "run")
    if named is None or hydra_multirun.asked(argv):
        with hydra_multirun.reported(argv):
            hydra_command.run_composed("train", argv, _train)
        return
    from vitscope.runs import run_dir
    from vitscope.training import resume_point
    from vitscope.training.training_run import train

    run = run_dir.find(named)
    cfg = run.config()
    resume_point.forget_start_file(cfg, run)
    changes = [argument for argument in argv if not argument.startswith("run=")]
    with common_probe.provided(cfg):  # an earlier run's configuration has no such keys
        run_overrides.apply(cfg, changes)
        common_probe.apply_common_probe(cfg, changes)
    train(cfg, run)


def _train(cfg: DictConfig, overrides: Sequence[str]) -> float | None:
    if hydra_multirun.is_job():
        return hydra_multirun.job(METRIC)
    common_probe.apply_common_probe(cfg, overrides)
    validate_plain_values(cfg)
    from vitscope.training.training_run import train

    train(cfg)
    return None
