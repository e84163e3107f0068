"""Functions that tests run as jobs of a reproduction; the server of jobs imports it once."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from vitscope.reproduce import trial_jobs
from vitscope.reproduce.plan import Outcome, Trial

#: modules that the server of jobs imports
IMPORTS = (__name__,)


def told(folder: Path) -> int:
    """Print a line, write down the environment, and exit with 3."""
    print("hello from the job", flush=True)
    facts = {
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "home": os.environ.get("HOME"),
        "session": os.getsid(0) == os.getpid(),
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    return 3


def until_told(folder: Path) -> int:
    """Wait for SIGTERM and exit with 143."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    (folder / "ready").touch()
    time.sleep(60)
    return 0


def tried(trial: Trial, root: Path, folder: Path) -> int:
    """Perform a trial as its overrides say: one dies, one fails, the others do well; write down when it ran."""
    settings = dict(override.split("=", 1) for override in trial.overrides)
    if settings.get("do") == "die":
        print("out of memory", flush=True)
        os._exit(9)
    if settings.get("do") == "fail":
        trial_jobs.write_outcome(Outcome(None, (f"{trial.name} (no such data)",)), folder)
        return 3
    started = time.monotonic()
    time.sleep(float(settings.get("seconds", 0.0)))
    root.mkdir(parents=True, exist_ok=True)
    with (root / "spans.jsonl").open("a") as file:
        row = {
            "name": trial.name,
            "start": started,
            "end": time.monotonic(),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        file.write(json.dumps(row) + "\n")
    trial_jobs.write_outcome(Outcome(root / trial.overrides[0], (), ("hessian/end-0badcafe",)), folder)
    return 0


def submitted_tried(trial: Trial, root: Path, folder: Path, environment: dict[str, str]) -> int:
    """Perform a trial as `tried` does, with the arguments of the function that runs on a compute node."""
    os.environ.update(environment)
    return tried(trial, root, folder)
