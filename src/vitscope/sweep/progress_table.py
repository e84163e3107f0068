"""Show the progress of a sweep: a live table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vitscope.runtime.logging import log_problem
from vitscope.sweep import sweep_file

if TYPE_CHECKING:
    from vitscope.sweep.local_runner import LocalSweep, Trial

_logger = logging.getLogger(__name__)

_STYLES = {"finished": "green", "failed": "bold red", "running": "cyan", "stopped early": "yellow", "stopped": "yellow"}


def table(sweep: LocalSweep) -> Table:
    """Return the state of every trial proposed so far."""
    rich_table = Table(title=f"{sweep.folder.name}: {_counts(sweep)}", title_justify="left")
    for name in ("trial", "settings", "on", "state", "epoch", "step", sweep.metric, "seconds"):
        rich_table.add_column(
            name, justify="right" if name in ("trial", "epoch", "step", "seconds", sweep.metric) else "left"
        )
    for trial in sweep.trials:
        value = f"{trial.history[-1]:.4g}" if trial.history else ""
        seconds = time.monotonic() - trial.started if trial.process else trial.wall_s
        state = trial.state if trial.state != "failed" else f"failed ({trial.exit_code})"
        rich_table.add_row(
            str(trial.index), sweep_file.label(sweep.sweep, trial.params), trial.slot.name if trial.slot else "", state,
            str(trial.rows.get("epoch", "")), str(trial.rows.get("step", "")), value, f"{seconds:.0f}" if seconds else "",
            style=_STYLES.get(trial.state),
        )  # fmt: skip
    return rich_table


class SweepDisplay:
    """Shows a sweep; use it as a context, and as the ``show`` of a `LocalSweep`."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> SweepDisplay:
        """Take the terminal."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._live:
            self._live.stop()

    def __call__(self, sweep: LocalSweep, changed: Trial | None) -> None:
        """Draw the table again, or print what changed."""
        if self._live:
            self._live.update(table(sweep), refresh=True)
        elif changed is not None:
            print(line(sweep, changed), flush=True)


def line(sweep: LocalSweep, trial: Trial) -> str:
    """Return one line on one trial."""
    facts = [trial.slot.name] if trial.slot else []
    if trial.state == "failed":
        facts.append(f"exit {trial.exit_code}")
    if trial.state == "stopped early" and trial.rung is not None:
        facts.append(f"behind at iteration {trial.rung}")
    if trial.history and trial.state != "running":
        facts.append(f"{sweep.metric} {trial.history[-1]:.4g}")
    if trial.wall_s:
        facts.append(f"{trial.wall_s:.0f} s")
    what = sweep_file.label(sweep.sweep, trial.params)
    return f"trial {trial.index} ({what}): {trial.state}{', ' * bool(facts)}{', '.join(facts)}"


def report(sweep: LocalSweep) -> None:
    """Log the failed trials, and print how many there are of each state and the sweep's folder."""
    for trial in sweep.failed():
        what = sweep_file.label(sweep.sweep, trial.params)
        log_problem(
            _logger, f"failed: trial {trial.index} ({what}): exit {trial.exit_code}; {trial.folder}: {trial.why}"
        )
    print(f"{_counts(sweep)}; {sweep.folder}", flush=True)


def _counts(sweep: LocalSweep) -> str:
    states = [trial.state for trial in sweep.trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no trial"
