"""A program that behaves as ``train.py`` towards a sweep (run folder, result files, signals) and takes no time.

The behavior of a trial is the parameter ``do``: ``finish``, ``fail`` (once; the next start finishes), ``lie`` (exit 0 without
a result), ``wait`` (until a signal; saves, exits 143 or 130; the next start finishes), ``learn`` (a metric row every 20 ms),
``diverge`` (a last row without a finite metric).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

given = dict(argument.split("=", 1) for argument in sys.argv[1:])
resumed = "run" in given
folder = Path(given.get("run") or given["run_dir"])
kept = folder / "config.yaml"
if not resumed:
    kept.write_text(json.dumps(given))
settings = json.loads(kept.read_text())


def say(status: str, code: int) -> None:
    facts = {"status": status, "exit_code": code, "wandb_id": os.environ.get("WANDB_RUN_ID")}
    (folder / "provenance.json").write_text(json.dumps(facts))


def log(step: int, value: float | None) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "epoch": step, "val/accuracy": value}) + "\n")


def stop(signum: int, frame: object) -> None:
    code = 130 if signum == signal.SIGINT else 143
    say("stopped", code)
    sys.exit(code)


with (folder / "starts.txt").open("a") as starts:
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_RUN_GROUP", "RANK")
    starts.write(json.dumps({"resumed": resumed, **{name: os.environ.get(name) for name in names}}) + "\n")
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
say("running", 1)
do = settings["do"]
if do == "wait" and not resumed:
    (folder / "ready").touch()
    time.sleep(30)
if do == "fail" and not resumed:
    print("error: data.root=x: not there; name another")
    say("failed", 3)
    sys.exit(3)
if do == "lie":
    sys.exit(0)
for step in range(int(settings.get("steps", 1))):
    log(step, float(settings.get("accuracy", 0.5)) + 0.001 * step)
    time.sleep(0.02 if do == "learn" else 0.0)
if do == "diverge":
    log(int(settings.get("steps", 1)), None)
say("finished", 0)
