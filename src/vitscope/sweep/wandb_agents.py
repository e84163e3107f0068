"""``make sweep``: a sweep on a W&B server, one pinned agent per slot; how it ended is read from the run folders."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vitscope.config.experiment_identity import RUN_KEYS
from vitscope.runs import run_search
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.logging import log_problem
from vitscope.runtime.stop_flag import Interrupted
from vitscope.runtime.text_layout import count_text
from vitscope.sweep import trial_process
from vitscope.sweep.sweep_file import Sweep
from vitscope.sweep.trial_process import Slot

_logger = logging.getLogger(__name__)


def create(sweep: Sweep) -> str:
    """Create the sweep with ``wandb sweep`` and return its full id, ``entity/project/id``.

    Raises:
        ConfigError: The server refused it or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"{sweep.path.stem}.yaml")
        path.write_text(yaml.safe_dump(content(sweep), sort_keys=False))
        env = trial_process.environment(PATH=_path(), WANDB_DIR=place)
        env.pop("WANDB_SILENT", None)  # the id is in what it prints
        ask = [_wandb(), "sweep", str(path)]
        process = subprocess.run(ask, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    match = re.search(r"wandb agent (\S+)", process.stdout + process.stderr)
    if match is None:
        lines = [line for line in (process.stderr + process.stdout).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no answer")
        fix = "run wandb login and check the network, or use make sweep-local, which needs no server"
        raise ConfigError("SWEEP", sweep.path, f"wandb sweep failed ({reason.strip()})", fix)
    return match[1]


def content(sweep: Sweep) -> dict[str, Any]:
    """Return the file that the server gets: the sweep's, with a trial that was preempted going on where it stopped."""
    parameters = dict(sweep.parameters)
    # a preempted trial finds its own checkpoint by its config hash, which must tell it from the other trials
    if all(key.split(".")[0] in RUN_KEYS for key in sweep.swept):
        parameters["ckpt_path"] = {"value": "auto"}
    served = {"name": sweep.path.stem, **sweep.content, "parameters": parameters}
    if not Path(sweep.program).is_file():  # no checkout here: the installed package trains
        served["command"] = ["${env}", "python", "-m", "vitscope", "train", "${args_no_hyphens}"]
    return served


def run(sweep: Sweep, sweep_id: str, folder: Path, slots: Sequence[Slot], limit: int | None = None) -> int:
    """Run one agent a slot until the server has no more trials.

    Args:
        sweep: The file that made it.
        sweep_id: ``entity/project/id`` or ``id``.
        folder: Folder of the runs and of the agents' logs.
        slots: GPUs or shares of the CPU's cores, each of which runs one agent.
        limit: Largest number of trials, shared among the agents.

    Returns:
        0 if every trial that an agent started has finished; else the exit code of the first that has not.

    Raises:
        Interrupted: Asked to stop; the trials have saved and ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    agents: list[trial_process.ChildProcess] = []
    for number, slot in enumerate(slots):
        share = [] if limit is None else ["--count", str(limit // len(slots) + (number < limit % len(slots)))]
        if share[1:] == ["0"]:
            continue
        env = trial_process.environment(
            slot, PATH=_path(), VITSCOPE_RUNS=str(folder), WANDB_DIR=str(folder), WANDB_RUN_GROUP=folder.name
        )
        command = [_wandb(), "agent", "--forward-signals", *share, sweep_id]
        agents.append(trial_process.start(command, env, folder / f"agent-{slot.name}.log"))
    reported: dict[str, str] = {}
    try:
        while any(agent.poll() is None for agent in agents):
            if (signum := stop_flag.requested()) is not None:
                raise Interrupted(signum)
            _print_changed_states(folder, reported)
            time.sleep(0.2)
    finally:
        trial_process.stop(agents, stop_flag.requested() or 15)
        _print_changed_states(folder, reported)
    broken = [agent for agent in agents if agent.returncode]
    return report(folder, len(broken), may_stop="early_terminate" in sweep.content)


def report(folder: Path, broken: int = 0, *, may_stop: bool = False) -> int:
    """Log the trials of a sweep's folder that have not finished; return the first one's exit code.

    Agents exit 0 after failed trials, so only run folders count. A trial that an agent started and that left no folder
    (its command line was refused) failed too.

    Args:
        folder: Folder of the sweep.
        broken: Number of agents that ended with an error.
        may_stop: Whether the server may stop trials early, so that a stopped one is complete.
    """
    first, finished = 0, 0
    runs = run_search.every(folder)
    for run_ in runs:
        outcome = trial_process.outcome(run_.path)
        if outcome.finished or (outcome.status == "stopped" and may_stop):
            finished += 1
            continue
        code = outcome.exit_code or 1
        first = first or code
        state = outcome.status if outcome.status != "running" else "killed"
        log_problem(_logger, f"failed: {run_.path}: {state}, exit {code}; {trial_process.last_error(run_.log)}")
    run_ids = {run_.provenance().get("wandb_id") for run_ in runs}
    for path in sorted(folder.glob("wandb/sweep-*/config-*.yaml")):
        run_id = path.stem.removeprefix("config-")
        if run_id not in run_ids:
            first = first or 2
            log_problem(_logger, f"failed: W&B run {run_id} left no run folder; see {folder}/agent-*.log")
    if broken:
        first = first or 1
        agents = count_text(broken, "agent")
        log_problem(_logger, f"failed: {agents} ended with an error; see {folder}/agent-*.log")
    print(f"{finished} of {len(runs)} trials finished; {folder}", flush=True)
    return first


def _print_changed_states(folder: Path, reported: dict[str, str]) -> None:
    """Print a line for each run whose state has changed."""
    for run_ in run_search.every(folder):
        outcome = trial_process.outcome(run_.path)
        state = f"{outcome.status}{f' (exit {outcome.exit_code})' if outcome.exit_code else ''}"
        if reported.get(run_.id) != state:
            reported[run_.id] = state
            print(f"{run_.id}: {state}", flush=True)


def _wandb() -> str:
    beside = Path(sys.executable).parent / "wandb"
    return str(beside) if beside.exists() else shutil.which("wandb") or "wandb"


def _path() -> str:
    # the command of a sweep says `python`: it must be this one
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
