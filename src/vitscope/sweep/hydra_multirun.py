"""``python train.py -m seed=0,1``: Hydra's multirun, each job a process of its own.

Jobs in one process would share signals, W&B's state and, with several ranks, restart the whole multirun in every rank (a
sweeper that learns would train different jobs on different ranks). So whatever the launcher, a job starts
``train.py <its overrides> run_dir=<its folder>`` without the parent's distributed variables and reads its result files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vitscope.config.hydra_internals import Callback
from vitscope.runtime import atomic_write, redaction, stop_flag
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.logging import log_problem
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import trial_process

_logger = logging.getLogger(__name__)

#: environment variable that passes the folder's name to Hydra's configuration (``hydra.sweep.dir``)
ENVIRONMENT = "VITSCOPE_MULTIRUN"
#: files that a job writes beside its run's own
JOB = "job.json"
OUTPUT = "output.txt"
#: (group, choice) to the plugin's package and the extra that installs it
PLUGINS = {
    ("hydra/launcher", "parallel"): ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    ("hydra/launcher", "joblib"): ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    ("hydra/launcher", "local"): ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    ("hydra/launcher", "slurm"): ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    ("hydra/launcher", "submitit_local"): ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    ("hydra/launcher", "submitit_slurm"): ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    ("hydra/sweeper", "bayes"): ("hydra_plugins.hydra_optuna_sweeper", "hydra-optuna"),
    ("hydra/sweeper", "optuna"): ("hydra_plugins.hydra_optuna_sweeper", "hydra-optuna"),
}
_folder: Path | None = None


def asked(argv: Sequence[str]) -> bool:
    """Tell whether a command line asks for a multirun."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(argv))


def check(argv: Sequence[str]) -> None:
    """Refuse a multirun that could not be right.

    Raises:
        ConfigError: A plugin that is not installed, a folder or run that all jobs would share, ranks started outside.
    """
    arguments = {key: value for key, _, value in (a.partition("=") for a in argv)}
    for key in ("run", "run_dir"):
        if arguments.get(key, "null") not in ("null", ""):
            raise ConfigError(
                key, arguments[key], "all jobs of a multirun would share it", "leave it out, or leave out -m"
            )
    for (group, choice), (package, extra) in PLUGINS.items():
        if arguments.get(group) == choice and not _installed(package):
            raise ConfigError(group, choice, "its plugin is not installed", f"pip install 'vitscope[{extra}]'")
    if arguments.get("hydra/launcher") in ("slurm", "submitit_slurm") and shutil.which("sbatch") is None:
        raise ConfigError(
            "hydra/launcher", arguments["hydra/launcher"], "no SLURM here (sbatch not found)", "use local"
        )
    if arguments.get("hydra/sweeper") == "optuna" and "hydra.sweeper.direction" not in arguments:
        reason = "the plugin's default would minimize the accuracy"
        raise ConfigError("hydra/sweeper", "optuna", reason, "use hydra/sweeper=bayes, or set hydra.sweeper.direction")
    for key in ("hydra.launcher.tasks_per_node", "hydra.launcher.nodes"):
        if arguments.get(key, "1") != "1":
            raise ConfigError(key, arguments[key], "a job starts its own ranks", "leave it 1 and set trainer.devices")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        reason = "every rank of torchrun would run every job"
        raise ConfigError(
            "-m", None, reason, "start it once with plain python; trainer.devices gives each job its ranks"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def reported(argv: Sequence[str]) -> Iterator[None]:
    """Around a command that may be a multirun: check it, and end with the first failed job's exit code.

    Raises:
        SystemExit: A job failed; all that did are named on stderr.
    """
    global _folder
    if not asked(argv):
        yield
        return
    check(argv)
    _folder = None
    os.environ[ENVIRONMENT] = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if any(a.startswith("hydra/launcher=") and not a.endswith("=basic") for a in argv):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, _raise)  # the launcher waits where nothing polls
    try:
        yield
    except Exception as error:
        if isinstance(error, Interrupted) or not _log_failed_jobs():
            raise  # else the sweeper's complaint follows from the failed jobs, which have been named
    finally:
        os.environ.pop(ENVIRONMENT, None)
    if code := _log_failed_jobs():
        sys.exit(code)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _log_failed_jobs() -> int:
    """Log the failed jobs, once; return the first one's exit code."""
    global _folder
    files = sorted(_folder.rglob(JOB), key=_job_order) if _folder else []
    jobs = [(file.parent, json.loads(file.read_text())) for file in files]
    failed = [(folder, job) for folder, job in jobs if job["exit_code"] != 0]
    shared = set.intersection(*(set(job["overrides"]) for _, job in jobs)) if len(jobs) > 1 else set()
    for folder, job in failed:
        reason = (
            trial_process.last_error(folder / OUTPUT) or trial_process.last_error(folder / "log.txt") or "see above"
        )
        what = " ".join(override for override in job["overrides"] if override not in shared)
        log_problem(_logger, f"failed: job {folder.name} ({what}): exit {job['exit_code']}; {folder}: {reason}")
    if jobs:
        print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished; {_folder}", flush=True)
    _folder = None
    return failed[0][1]["exit_code"] if failed else 0


def _job_order(file: Path) -> tuple[int, str]:
    """Order jobs by number; ``hydra.sweep.subdir`` may give their folders other names."""
    name = file.parent.name
    return (int(name) if name.isdecimal() else -1, str(file))


class Folder(Callback):
    """Hydra's callback (``hydra.callbacks``) that tells this module where the jobs' folders are."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the folder."""
        global _folder
        _folder = Path(str(config.hydra.sweep.dir)).absolute()


def is_job() -> bool:
    """Tell whether Hydra is running a job of a multirun in this process."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job(metric: str) -> float | None:
    """Run the job that Hydra composed, as a process; return the last value of ``metric``, None where it failed.

    Raises:
        Interrupted: Asked to stop; the job has saved and ended.
    """
    from vitscope.runs import metrics_log  # imports torch, which a command without jobs may not need

    stop_flag.check()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    _redact(Path(str(hydra.sweep.dir)) / "multirun.yaml")
    overrides = list(hydra.overrides.task)
    launcher = str(hydra.launcher.get("_target_", ""))
    side_by_side = int(hydra.launcher.get("n_jobs", 1))
    slot = trial_process.Slot("job", trial_process.threads(max(1, side_by_side))) if side_by_side > 1 else None
    log = None if launcher.endswith("BasicLauncher") else folder / OUTPUT
    process = trial_process.start(
        trial_process.training(trial_process.train_program(), overrides, folder), trial_process.environment(slot), log
    )
    signum = None
    try:
        while process.poll() is None and signum is None:
            signum = stop_flag.requested()
            time.sleep(0.05)
    except KeyboardInterrupt:  # a launcher's worker has no handler of ours
        signum = signal.SIGINT
    finally:
        trial_process.stop([process], signum or signal.SIGTERM)
    code = trial_process.exit_code(process)
    outcome = trial_process.outcome(folder)
    if code == 0 and not outcome.finished:
        code = outcome.exit_code or 1
    job_facts = {"overrides": list(map(redaction.cleaned, overrides)), "exit_code": code}
    atomic_write.write_atomically(folder / JOB, json.dumps(job_facts).encode())
    if signum is not None:
        raise Interrupted(signum)
    value = metrics_log.last_values(folder / metrics_log.FILE).get(metric) if code == 0 else None
    return None if value is None else float(value)


def _redact(file: Path) -> None:
    """Take the secrets out of the configuration that Hydra writes for a multirun before its first job."""
    if file.is_file() and not file.is_symlink():
        content = yaml.safe_load(file.read_text())
        if (clean := redaction.redacted(content)) != content:
            atomic_write.write_atomically(file, yaml.safe_dump(clean, sort_keys=False).encode())
