"""``analyze.py``: measure a trained run, a checkpoint file, or any model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vitscope.analyses import rank_request
from vitscope.cli import exit_codes, hydra_command, other_tools, rank_launcher
from vitscope.config.keys import common_probe
from vitscope.config.loss import loss_overrides
from vitscope.config.validation import validate_plain_values
from vitscope.runs import run_overrides
from vitscope.runtime.errors import ConfigError


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    arguments, run_value_overrides = loss_overrides.joined(sys.argv[1:]), []
    if hydra_command.answered("analyze", arguments):
        return
    other_tools.refuse_foreign_names("analyze", arguments)
    if run_overrides.value_of(arguments, "run") is not None:
        # the configuration that Hydra composes does not hold the run's own values
        arguments, run_value_overrides = run_overrides.split(arguments, run_overrides.RUN_GROUPS)
    task = functools.update_wrapper(functools.partial(_analyze, run_value_overrides=run_value_overrides), _analyze)
    hydra_command.run_composed("analyze", arguments, task)


def _analyze(cfg: DictConfig, overrides: Sequence[str], *, run_value_overrides: Sequence[str]) -> None:
    request = rank_request.take_request(cfg, overrides)
    common_probe.apply_common_probe(cfg, overrides)
    if not cfg.run:
        validate_plain_values(cfg)
    if cfg.cost:
        _print_costs(cfg, overrides, run_value_overrides, request.n_ranks if request is not None else 1)
        return
    if request is not None and request.n_ranks > 1:
        rank_launcher.run_ranks(request.n_ranks, sys.argv[1:])
        return
    from vitscope.analyses import process_group  # imports torch
    from vitscope.analyses.analysis_run import analyze

    with process_group.joined(request, str(cfg.device)):
        analyze(cfg, _chosen_keys(overrides), run_value_overrides)


def _print_costs(cfg: DictConfig, overrides: Sequence[str], run_value_overrides: Sequence[str], n_started: int) -> None:
    """Print what the analyses would cost each of the processes that ``trainer`` asks for; this one alone predicts it.

    Raises:
        ConfigError: A launcher started several processes, or ``cost`` is neither true nor false.
    """
    if not isinstance(cfg.cost, bool):
        raise ConfigError("cost", cfg.cost, "neither true nor false", "set cost=true")
    if rank_request.launched_world_size() > 1:
        reason = "the prediction is one process's"
        raise ConfigError("cost", True, reason, "start it without a launcher; trainer=ddp says for how many processes")
    from vitscope.analyses import analysis_run  # imports torch
    from vitscope.analyses.prediction import cost_table

    costs = analysis_run.predict(cfg, _chosen_keys(overrides), run_value_overrides, max(n_started, 1))
    print(cost_table.cost_table(costs))


def _chosen_keys(overrides: Sequence[str]) -> list[str]:
    return [key for key in map(_key, overrides) if not key.startswith("trainer")]


def _key(override: str) -> str:
    return override.partition("=")[0]
