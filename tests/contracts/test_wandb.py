"""Needs of W&B beyond its documented interface: `vitscope.runs.wandb_mirror`, `vitscope.sweep.wandb_agents`.

Commands, runs and agents are tried against a server of the tests in `tests/sweep/test_wandb_agents.py` and
`tests/cli/test_wandb.py`; these tests name the needs that no documentation states.
"""

from __future__ import annotations

import wandb
from wandb.cli.cli import cli


def test_the_upload_of_the_command_line_can_be_switched_off() -> None:
    """The command line may hold secrets; ``x_`` marks settings that may change."""
    assert wandb.Settings(x_disable_meta=True).x_disable_meta is True
    assert wandb.Settings().x_disable_meta is False


def test_agents_take_the_options_that_are_passed_to_them() -> None:
    options = {option for parameter in cli.commands["agent"].params for option in parameter.opts}
    assert {"--forward-signals", "--count"} <= options


def test_the_sweep_command_exists() -> None:
    assert "sweep" in cli.commands
