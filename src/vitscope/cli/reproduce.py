"""``vitscope reproduce fig4 profile=smoke``: a figure or table of the paper by its name, from new or existing runs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscope.cli import exit_codes
from vitscope.config import loading
from vitscope.reproduce import command_line, run_overrides
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce.command_line import Request
from vitscope.reproduce.plan import Outcome, Target, Trial
from vitscope.runtime.errors import DataError
from vitscope.runtime.logging import log_problem

_logger = logging.getLogger(__name__)

#: performs trials in a folder of runs, and yields each with its outcome
Work = Callable[[Sequence[Trial], Path], Iterator[tuple[Trial, Outcome]]]


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(lambda: reproduce(command_line.parse(sys.argv[1:])))


def reproduce(request: Request, work: Work | None = None) -> None:
    """Train and measure what the targets lack, draw them, and name every cell that is missing.

    Args:
        request: What to make, and how.
        work: Performs trials; jobs on this machine or on SLURM do by default.

    Raises:
        ConfigError: An unknown target or profile, or a setting that does not fit.
        DataError: Numbers or figures are missing; each is named on stderr.
        Interrupted: A stop was asked for; what was finished is kept.
    """
    plan = reproduction.read()
    names = reproduction.select(request.names, plan)
    if request.sources:
        _redraw(request, plan, names)
        return
    targets = [reproduction.target(name, plan, request.profile, request.seeds, request.overrides) for name in names]
    trials = list(dict.fromkeys(trial for target in targets for trial in target.trials))
    if request.dry:
        _list_work(request, plan, targets, trials)
        return
    from vitscope.reproduce import draw as drawing  # imports torch; a target that does not exist has been refused

    outcomes: dict[Trial, Outcome] = {}
    waiting = list(targets)
    problems: list[str] = []
    started = time.monotonic()
    for trial, outcome in (work or _jobs(request, plan))(trials, request.runs):
        outcomes[trial] = outcome
        if work is not None:
            state = "failed" if outcome.problems else "done"
            _logger.info(f"[{len(outcomes)}/{len(trials)}, {time.monotonic() - started:.0f} s] {state}: {trial.name}")
        for target in [t for t in waiting if all(needed in outcomes for needed in t.trials)]:
            waiting.remove(target)
            problems += _drawn(target, outcomes, request.out, drawing.draw)
    for target in waiting:
        problems += _drawn(target, outcomes, request.out, drawing.draw)
    if "all" in request.names:
        _page(request.runs, request.out)
    if request.export is not None:
        _export(request, request.export, targets, outcomes)
    _raise_problems(request, problems)


def _raise_problems(request: Request, problems: Sequence[str]) -> None:
    """Name what is missing or failed, a line each.

    Raises:
        DataError: There is any.
    """
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        log_problem(_logger, problem)
    if problems:
        raise DataError("target", " ".join(request.names), f"{len(problems)} missing or failed, named above",
                        "see the runs' log.txt and run the same command again")  # fmt: skip


def _export(request: Request, folder: Path, targets: Sequence[Target], outcomes: Mapping[Trial, Outcome]) -> None:
    """Write the numbers of the targets' runs as a study."""
    from vitscope.reports.exports import study_export
    from vitscope.reproduce import draw as drawing
    from vitscope.runtime.text_layout import size_text

    by_target = {
        target.name: drawing.entries([outcomes[trial] for trial in target.trials if trial in outcomes])
        for target in targets
    }
    size = study_export.write(folder, request.profile, by_target)
    print(f"{folder}: {len({e.id for entries in by_target.values() for e in entries})} runs, {size_text(size)}")


def _redraw(request: Request, plan: Mapping[str, Any], names: Sequence[str]) -> None:
    """Draw tables and figures of numbers from a study or its parts, and write the parts as one."""
    from vitscope.reports.exports import study_export
    from vitscope.reproduce import draw as drawing
    from vitscope.runtime.text_layout import size_text

    profile = study_export.profile_of(request.sources[0])
    problems: list[str] = []
    for name in names:
        target = reproduction.target(name, plan, profile)
        if target.drawings:
            figures = ", ".join(d.analysis for d in target.drawings)
            _logger.info(
                f"not drawn: {name}: {figures} (figures of arrays, which a study does not hold; train instead)"
            )
        problems += drawing.draw_numbers(target, study_export.read(request.sources, name), request.out)
    if request.export is not None:
        size = study_export.join(request.export, request.sources, names)
        print(f"{request.export}: {' and '.join(map(str, request.sources))}, {size_text(size)}")
    _raise_problems(request, problems)


def _rates(request: Request, plan: Mapping[str, Any]) -> Any:
    from vitscope.reproduce.cost_estimates import Rates

    folders = [request.runs]
    if request.runs.parent.name == "runs":  # runs of other overrides and profiles tell rates too
        folders.append(request.runs.parent)
    # the profile's stated rates are those of its own settings
    stated = {} if run_overrides.changes_work(request.overrides) else plan["profiles"][request.profile]
    return Rates(folders, stated, plan.get("train_images"))


def _list_work(request: Request, plan: Mapping[str, Any], targets: Sequence[Target], trials: Sequence[Trial]) -> None:
    """Print what is to be done, and do nothing."""
    from vitscope.reproduce import planned_work, work_listing

    planned = planned_work.plan_trials(trials, request.runs, checks=bool(request.overrides))
    settings = f", {' '.join(request.overrides)}" if request.overrides else ""
    print(
        f"profile {request.profile}, {request.seeds_text()}{settings}; runs in {request.runs}, figures in {request.out}\n"
    )
    n_slots = max(1, len(request.gpus.split(",")) if request.gpus else 0, request.jobs or 0)
    by_trial = {p.trial: p for p in planned}
    print(work_listing.listing(targets, by_trial, _rates(request, plan), n_slots))
    print("nothing was run (dry)")


def _jobs(request: Request, plan: Mapping[str, Any]) -> Work:
    """Return the work that performs trials as jobs of the sweep's scheduler.

    Raises:
        ConfigError: GPUs that are not here, no submitit, or no SLURM.
    """
    from vitscope.cli import reproduce_jobs

    return reproduce_jobs.work(
        request.gpus,
        request.jobs,
        launcher=request.launcher,
        slurm={**(plan.get("slurm") or {}), **request.slurm},
        rates=lambda: _rates(request, plan),
        checks=bool(request.overrides),
    )


def _drawn(target: Target, outcomes: dict[Trial, Outcome], out: Path, draw: Callable[..., list[str]]) -> list[str]:
    finished = {trial: outcomes[trial] for trial in target.trials if trial in outcomes}
    problems = [f"failed: {target.name}: {p}" for outcome in finished.values() for p in outcome.problems]
    problems += [f"missing: {target.name}: {trial.name}" for trial in target.trials if trial not in outcomes]
    return problems + draw(target, [outcome for outcome in finished.values() if outcome.run is not None], out)


def _page(root: Path, out: Path) -> None:
    from hydra import compose

    from vitscope.config import hydra_internals
    from vitscope.reports.report_run import report

    overrides = [
        loading.path_override("paths.runs", root.absolute()),
        loading.path_override("out", out.absolute()),
        "tag=end",
    ]
    with hydra_internals.composing_from(str(loading.folder()), "report"):
        cfg = compose("report", overrides=overrides)
    report(cfg)
