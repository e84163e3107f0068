"""``report.py``: overlay runs in figures, tables and one page."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vitscope.cli import exit_codes, hydra_command
from vitscope.config import loading


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(_command)


def _command() -> None:
    hydra_command.uncaught(_composed)


@hydra.main(version_base="1.3", config_path=str(loading.folder()), config_name="report")
@hydra_command.kept_error
def _composed(cfg: DictConfig) -> None:
    from vitscope.reports.report_run import report  # imports torch, pandas and matplotlib

    report(cfg)
