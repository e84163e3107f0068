"""Show a sweep while it runs: a live table on a terminal, plain lines elsewhere; failures and ranking at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from vitscope.runtime import redaction
from vitscope.runtime.live_display import LiveDisplay
from vitscope.runtime.logging import log_problem
from vitscope.runtime.text_layout import duration_text
from vitscope.sweep import job_scheduler, sweep_file, trial_ranking
from vitscope.sweep.trial_process import OUTPUT

if TYPE_CHECKING:
    from vitscope.sweep.local_runner import LocalSweep, Trial

_logger = logging.getLogger(__name__)

#: seconds between two plain lines on a running trial
PLAIN_INTERVAL = 30.0
#: columns of a terminal from which on the live table has all its columns
WIDE = 110
#: trials of the ranking that are printed; the file has all
RANKING_ROWS = 20

_STYLES = {"finished": "green", "failed": "bold red", "running": "cyan", "stopped early": "yellow", "stopped": "yellow"}
#: lines of a terminal that the table's frame, title and caption take
_FRAME = 8


def table(sweep: LocalSweep, n_rows: int | None = None, width: int = WIDE) -> Table:
    """Return the state of the trials proposed so far.

    Args:
        sweep: The sweep.
        n_rows: At most so many trials: those that run, then those that failed, then the newest; None for all.
        width: Columns of the terminal; below `WIDE` a row leaves out the slot and the step.
    """
    rows = _selected(sweep.trials, n_rows)
    title = f"{short_path(sweep.folder)}: {_counts(sweep)}{_time_left(sweep)}"
    is_wide = width >= WIDE
    rich_table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                       padding=(0, 1))  # fmt: skip
    captions = [f"and {len(sweep.trials) - len(rows)} more trials"] if len(rows) < len(sweep.trials) else []
    if not is_wide:
        captions.append(f"output: <folder>/{OUTPUT}")
    rich_table.caption = "; ".join(captions) or None
    names = ["trial", "settings", "on", "state", "epoch", "step", sweep.metric, "time", "output"]
    if not is_wide:
        names = [name for name in names if name not in ("on", "step", "output")] + ["folder"]
    for name in names:
        is_number = name in ("trial", "epoch", "step", "time", sweep.metric)
        rich_table.add_column(
            name, justify="right" if is_number else "left", no_wrap=name != "settings", overflow="fold"
        )
    for trial in rows:
        cells = _cells(sweep, trial)
        rich_table.add_row(*(cells[name] for name in names), style=_STYLES.get(trial.state))
    return rich_table


def _cells(sweep: LocalSweep, trial: Trial) -> dict[str, str]:
    """Return the texts of a trial by the names of the columns."""
    return {
        "trial": str(trial.index),
        "settings": _label(sweep, trial),
        "on": trial.slot.name if trial.slot else "",
        "state": trial.state if trial.state != "failed" else f"failed ({trial.exit_code})",
        "epoch": str(trial.rows.get("epoch", "")),
        "step": str(trial.rows.get("step", "")),
        sweep.metric: f"{trial.value:.4g}" if trial.value is not None else "",
        "time": duration_text(round(trial.seconds)) if trial.seconds else "",
        "output": f"{trial.folder.name}/{OUTPUT}",
        "folder": trial.folder.name,
    }


def _selected(trials: Sequence[Trial], n_rows: int | None) -> list[Trial]:
    if n_rows is None or len(trials) <= n_rows:
        return list(trials)
    ranks = {"running": 0, "failed": 1}
    first = sorted(trials, key=lambda trial: (ranks.get(trial.state, 2), -trial.index))[: max(1, n_rows)]
    return sorted(first, key=lambda trial: trial.index)


class SweepDisplay(LiveDisplay):
    """Shows a sweep; use it as a context, and as the ``show`` of a `LocalSweep`.

    Args:
        console: Where to draw; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console())
        self._last_lines: dict[int, float] = {}

    def __call__(self, sweep: LocalSweep, changed: Trial | None) -> None:
        """Draw the table again; where there is no terminal, print what changed and now and then how far trials are."""
        if self._live:
            n_rows = max(1, self._console.height - _FRAME)
            self._live.update(table(sweep, n_rows, self._console.width), refresh=True)
            return
        now = time.monotonic()
        if changed is not None:
            self._last_lines[changed.index] = now
            print(line(sweep, changed), flush=True)
        for trial in sweep.trials:
            if trial.state == "running" and now - self._last_lines.get(trial.index, now) >= PLAIN_INTERVAL:
                self._last_lines[trial.index] = now
                print(progress_line(sweep, trial), flush=True)


def line(sweep: LocalSweep, trial: Trial) -> str:
    """Return one line on a trial whose state has changed."""
    facts = [trial.slot.name] if trial.slot else []
    if trial.state == "failed":
        facts.append(f"exit {trial.exit_code}")
    if trial.state == "stopped early" and trial.rung is not None:
        facts.append(f"behind at iteration {trial.rung}")
    if trial.value is not None and trial.state != "running":
        facts.append(f"{sweep.metric} {trial.value:.4g}")
    if trial.state == "running":
        facts.append(f"output {short_path(trial.output)}")
    elif trial.wall_s:
        facts.append(duration_text(round(trial.wall_s)))
    return f"trial {trial.index} ({_label(sweep, trial)}): {', '.join([trial.state, *facts])}"


def progress_line(sweep: LocalSweep, trial: Trial) -> str:
    """Return one line on how far a running trial is."""
    facts = [f"{key} {trial.rows[key]}" for key in ("epoch", "step") if key in trial.rows]
    if trial.value is not None:
        facts.append(f"{sweep.metric} {trial.value:.4g}")
    facts = facts or ["nothing logged yet"]
    where = "" if trial.value is not None else f", output {short_path(trial.output)}"
    return f"trial {trial.index} ({_label(sweep, trial)}): {', '.join(facts)}, {duration_text(round(trial.seconds))}{where}"


def report(sweep: LocalSweep) -> None:
    """Log the failed trials; print the ranking by the sweep's metric, write all trials as CSV, and print its path."""
    for trial in sweep.failed():
        log_problem(
            _logger,
            f"failed: trial {trial.index} ({_label(sweep, trial)}): exit {trial.exit_code}; {trial.folder}: {trial.why}",
        )
    ranking = sweep.ranking()
    if ranking:
        print(trial_ranking.text(sweep, RANKING_ROWS))
    if sweep.trials:
        print(f"all trials, their settings and metrics: {short_path(trial_ranking.write(sweep))}")
    print(f"{_counts(sweep)}; {sweep.folder}", flush=True)


def short_path(path: Path) -> str:
    """Return a path as the user would type it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _label(sweep: LocalSweep, trial: Trial) -> str:
    return redaction.masked(sweep_file.label(sweep.sweep, trial.params))


def _counts(sweep: LocalSweep) -> str:
    states = [trial.state for trial in sweep.trials]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "waiting"]
    if waiting := sweep.search.n_trials - len(states) + states.count("waiting"):
        counts.append(f"{waiting} waiting")
    return ", ".join(counts) or "no trial"


def _time_left(sweep: LocalSweep) -> str:
    """Return the time left by the mean of the complete trials, an empty text before the first one."""
    complete = [trial.wall_s for trial in sweep.trials if trial.state in ("finished", "stopped early") and trial.wall_s]
    unfinished = [trial for trial in sweep.trials if trial.state == "running"]
    waiting = sweep.search.n_trials - len(sweep.trials)
    if not complete or not (unfinished or waiting):
        return ""
    mean = sum(complete) / len(complete)
    rests = [mean - trial.seconds for trial in unfinished]
    if any(rest < 0 for rest in rests):  # longer than those before
        return ""
    rest = job_scheduler.side_by_side_seconds([*rests, *[mean] * waiting], len(sweep.slots))
    return f", about {duration_text(max(rest, 1.0))} left"
