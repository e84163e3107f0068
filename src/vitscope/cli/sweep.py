"""``vitscope sweep``, ``make sweep-local`` and ``make sweep``: the trials of a W&B sweep file, with or without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from vitscope.cli import exit_codes
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.text_layout import count_text
from vitscope.sweep import lint, progress_table, sweep_file, trial_process

USAGE = """usage: vitscope sweep FILE [gpus=0,1 | jobs=2] [limit=n] [dry=true] [server=true [sweep_id=ID]] [key=value ...]

  FILE        a W&B sweep file in any folder, or the name of a sweep of the package (below)
  gpus=0,1    one trial at a time on each of these GPUs (0+1: a trial on two)
  jobs=2      two trials side by side on the CPU, which share its cores
  limit=n     the first n trials only
  dry=true    only list the trials
  server=true create the sweep on the W&B server and start one agent for each GPU or job; sweep_id=ID: resume a sweep
  key=value   an override for every trial, such as profile=smoke caps=smoke trainer.max_epochs=5

Trials are written to runs/sweeps/<name>-<hash>/, ranked in trials.csv. The same command resumes a sweep.
method: grid, random, or bayes (Optuna: pip install 'vitscope[optuna]')."""
OPTIONS = ("gpus", "jobs", "limit", "dry", "server", "sweep_id")


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(lambda: sys.exit(command(sys.argv[1:])))


def command(argv: Sequence[str]) -> int:
    """Run a sweep.

    Returns:
        0 only if every trial finished, else the first failing trial's exit code.

    Raises:
        ConfigError: A wrong option, or a sweep that would break.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{USAGE}\n\nsweeps of the package:\n{_bundled_sweeps()}")
        return 0
    file, *rest = argv
    if "=" in file:
        raise ConfigError(
            "SWEEP",
            None,
            "no sweep file named",
            "write make sweep-local SWEEP=sweeps/models.yaml JOBS=2, or vitscope sweep models jobs=2",
        )
    pairs = [item.partition("=") for item in rest]
    options = {key: value for key, _, value in pairs if key in OPTIONS and value}  # make leaves what was not set empty
    overrides = [item for item, (key, _, _) in zip(rest, pairs) if key not in OPTIONS]
    is_on_server = _flag("server", options.get("server", "false"))
    if "sweep_id" in options and not is_on_server:
        reason = "a sweep of this machine has no id"
        raise ConfigError("sweep_id", options["sweep_id"], reason, "add server=true, or leave it out")
    sweep = sweep_file.read(file, overrides)
    slots = trial_process.slots(options.get("gpus"), _whole("jobs", options.get("jobs")))
    limit = _whole("limit", options.get("limit"))
    trial_process.check_gpus(options.get("gpus"))
    lint.check(sweep, has_overrides=bool(overrides))
    if _flag("dry", options.get("dry", "false")):
        print("\n".join(_listing(sweep, limit)))
        return 0
    root = Path(os.environ.get("VITSCOPE_RUNS", "runs")) / "sweeps"
    if is_on_server:
        return _server(sweep, root, slots, limit, options.get("sweep_id"))
    from vitscope.sweep.local_runner import LocalSweep  # imports torch

    with progress_table.SweepDisplay() as display:
        local = LocalSweep(sweep, root, slots, limit=limit, show=display)
        try:
            code = local.run()
        except BaseException:
            progress_table.report(local)
            raise
    progress_table.report(local)
    return code


def _listing(sweep: sweep_file.Sweep, limit: int | None) -> list[str]:
    """Return the trials that would run, a line each; of Bayesian optimization their number: it chooses them while it runs."""
    if sweep.method == "bayes":
        n_trials = sweep_file.count(sweep, limit)
        number = "trials without end (no run_cap, no limit)" if n_trials is None else f"{n_trials} trials"
        return [f"{number}, chosen while the sweep runs", "nothing was run (dry)"]
    trials = sweep_file.planned(sweep, limit)
    lines = [f"trial {index}  {sweep_file.label(sweep, params)}" for index, params in enumerate(trials)]
    return [*lines, count_text(len(lines), "trial"), "nothing was run (dry)"]


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ConfigError(name, text, "neither true nor false", f"set {name}=true, or leave it out")
    return text.lower() in ("true", "1")


def _bundled_sweeps() -> str:
    """Return a line for each sweep of the package: its name, and the first sentence of its file."""
    files = sweep_file.bundled_files()
    width = max(map(len, files), default=0)
    comments = {name: file.read_text().partition("\n")[0].lstrip("# ") for name, file in files.items()}
    return "\n".join(f"  {name:{width}s}  {shorten(comment, 100).rstrip('. ')}" for name, comment in comments.items())


def _server(
    sweep: sweep_file.Sweep, root: Path, slots: Sequence[trial_process.Slot], limit: int | None, sweep_id: str | None
) -> int:
    from vitscope.sweep import wandb_agents  # imports torch

    if sweep_id is None:
        sweep_id = wandb_agents.create(sweep)
        print(f"created sweep {sweep_id}; resume it with SWEEP_ID={sweep_id}", flush=True)
    folder = (root / f"{sweep.path.stem}-{sweep_id.rpartition('/')[2]}").absolute()
    return wandb_agents.run(sweep, sweep_id, folder, slots, limit)


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            name.upper(), text, "not a whole number of at least 1", f"set {name.upper()}=2, or leave it out"
        )
    return int(text)
