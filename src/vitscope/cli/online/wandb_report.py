"""``vitscope wandb-report`` and ``make wandb-report``: a W&B report and a saved workspace of runs that were logged to W&B."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitscope.cli import exit_codes
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError, DataError
from vitscope.runtime.logging import log_problem

_logger = logging.getLogger(__name__)

USAGE = """usage: vitscope wandb-report [runs=FOLDER] [figures=FOLDER] [entity=NAME] [project=NAME] [title=TEXT] [spec=FILE]

  runs=FOLDER     folder of the run folders; default: runs. A sweep's runs: runs/sweeps/<name>-<hash>
  figures=FOLDER  figures of `vitscope report` or `vitscope reproduce`; default: figures. Its PNG files are logged to
                  one new run, which the report shows
  entity=, project=  where the runs are on the server; default: those of the runs' pages
  title=TEXT      default: the name of the folder of runs
  spec=FILE       write what the server would get as JSON and send nothing; needs no account and no network

The report and the workspace show the settings in which the runs differ and their outcomes as parallel coordinates, the
metrics over steps grouped by model, the claims of the paper as a table, and the figures. Needs pip install 'vitscope[report]'."""
OPTIONS = ("runs", "figures", "entity", "project", "title", "spec")


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(lambda: sys.exit(command(sys.argv[1:])))


def command(argv: Sequence[str]) -> int:
    """Make a report and a workspace, or their specification.

    Returns:
        0.

    Raises:
        ConfigError: An unknown option, no package, or no account.
        DataError: No run that was logged to W&B.
    """
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    options = _options(argv)
    from vitscope.reports.online import report_content, wandb_report  # imports torch
    from vitscope.reports.run_index import Damage, collect
    from vitscope.runs import run_search, wandb_mirror

    wandb_report.check_package()
    folder = Path(options.get("runs", os.environ.get("VITSCOPE_RUNS", "runs")))
    damaged: list[Damage] = []
    entries = collect(run_search.every(folder), damaged)
    for damage in damaged:
        log_problem(_logger, str(damage))
    content = report_content.collect(
        entries, Path(options.get("figures", "figures")), options.get("title", folder.name)
    )
    if not content.run_ids:
        fix = "train with logger=wandb, or name another folder"
        raise DataError("runs", folder, "no run there was logged to W&B", fix)
    entity, project = report_content.place_of(entries)
    entity, project = options.get("entity", entity), options.get("project", project)
    if "spec" in options:
        report, workspace = (
            build(content, "", project, "run-of-the-figures")
            for build in (wandb_report.build_report, wandb_report.build_workspace)
        )
        path = Path(options["spec"])
        path.write_text(json.dumps(wandb_report.specifications(report, workspace), indent=1) + "\n", encoding="utf-8")
        print(path)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        mirror = wandb_mirror.start_report(entity or None, project, content.title, Path(temporary))
        for name, file in content.figures.items():
            mirror.image(name, file, 0)
        figures_run, entity, project = mirror.id, mirror.entity or entity, mirror.project or project
        mirror.finish(0)
    report = wandb_report.build_report(content, entity, project, figures_run)
    print(f"report: {report.save().url}")
    print(f"workspace: {wandb_report.build_workspace(content, entity, project, figures_run).save().url}")
    return 0


def _options(argv: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in argv:
        key, separator, value = argument.partition("=")
        if not separator or key not in OPTIONS:
            raise ConfigError(argument, None, "no such option", errors.nearest(key, OPTIONS))
        if value:  # make leaves what was not set empty
            options[key] = value
    return options
