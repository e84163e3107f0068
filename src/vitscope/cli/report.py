"""``report.py``: overlay runs in figures, tables and one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vitscope.cli import exit_codes, hydra_command


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    if not hydra_command.answered("report", sys.argv[1:]):
        hydra_command.run_composed("report", sys.argv[1:], _report)


def _report(cfg: DictConfig, overrides: Sequence[str]) -> None:
    from vitscope.reports.report_run import report  # imports torch, pandas and matplotlib

    report(cfg)
