"""Rank a sweep's trials by its metric: a table to print, and a CSV file of all trials with settings and metrics."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.runtime import atomic_write, redaction
from vitscope.runtime.errors import StorageError
from vitscope.runtime.text_layout import aligned

if TYPE_CHECKING:
    from vitscope.sweep.local_runner import LocalSweep, Trial

#: name of the CSV file in the sweep's folder
FILE = "trials.csv"


def text(sweep: LocalSweep, n_rows: int) -> str:
    """Return the best trials as an aligned table.

    Args:
        sweep: The sweep, at least one of whose trials has a value of the metric.
        n_rows: Number of trials to show.
    """
    ranking = sweep.ranking()
    swept = sweep.sweep.swept
    best = "highest" if sweep.larger else "lowest"
    head = ["rank", "trial", *swept, sweep.metric, best, "state", "run folder"]
    rows = [
        [str(rank), str(trial.index), *(_short(trial.params[key]) for key in swept), f"{trial.value:.4g}",
         f"{_best(sweep, trial):.4g}", trial.state, trial.folder.name]
        for rank, trial in enumerate(ranking[:n_rows], start=1)
    ]  # fmt: skip
    right = {0, 1, *(i for i, name in enumerate(head) if name in (sweep.metric, best))}
    lines = aligned([head, *rows], right)
    goal = "maximize" if sweep.larger else "minimize"
    title = f"Ranking by the last {sweep.metric} ({goal}), beside the {best} value of each trial:"
    more = [f"{len(ranking) - n_rows} more in {FILE}"] if len(ranking) > n_rows else []
    return redaction.masked("\n".join(["", title, *lines, *more]))


def write(sweep: LocalSweep) -> Path:
    """Write all trials to ``trials.csv`` in the sweep's folder, ranked ones first; return its path.

    Columns: rank (empty without a finite last value), trial, state, exit code, every setting, the last value of every metric, the
    best value of the sweep's metric, epoch, step, seconds, run folder.

    Raises:
        StorageError: The file cannot be written.
    """
    ranking = sweep.ranking()
    ranks = {trial.index: rank for rank, trial in enumerate(ranking, start=1)}
    trials = [*ranking, *(trial for trial in sweep.trials if trial.index not in ranks)]
    metrics = sorted({key for trial in trials for key in trial.rows if "/" in key} | {sweep.metric})
    settings = list(dict.fromkeys(key for trial in trials for key in trial.params))
    best = f"{sweep.metric} ({'highest' if sweep.larger else 'lowest'})"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["rank", "trial", "state", "exit_code", *settings, *metrics, best, "epoch", "step", "seconds", "run_folder"]
    )
    for trial in trials:
        writer.writerow([
            ranks.get(trial.index, ""), trial.index, trial.state, "" if trial.exit_code is None else trial.exit_code,
            *(redaction.redacted({key: trial.params.get(key, "")})[key] for key in settings),
            *(trial.rows.get(key, "") for key in metrics),
            "" if trial.value is None else _best(sweep, trial), trial.rows.get("epoch", ""), trial.rows.get("step", ""),
            round(trial.seconds, 1), trial.folder,
        ])  # fmt: skip
    path = sweep.folder / FILE
    try:
        atomic_write.write_atomically(path, buffer.getvalue().encode())
    except OSError as error:
        raise StorageError("paths.runs", path, f"not writable ({error.strerror})", "free space, then repeat") from None
    return path


def _best(sweep: LocalSweep, trial: Trial) -> float:
    return max(trial.history) if sweep.larger else min(trial.history)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
