"""Seconds until a command answers that needs neither torch nor Lightning: ``--help``, refused overrides, ``import vitscope``.

Each command runs several times in a process of its own after one run that fills the disk cache; its exit code is checked.
Beside the median of the wall time stands the processor time of the process, which other work on the machine changes less.

    python benchmarks/startup.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: (what is shown, the interpreter's arguments, the expected exit code)
COMMANDS = (
    ("python train.py --help", ["train.py", "--help"], 0),
    ("python train.py model=alternett", ["train.py", "model=alternett"], 2),
    ("python train.py nokey=1", ["train.py", "nokey=1"], 2),
    ("python train.py optimizer.lr=abc", ["train.py", "optimizer.lr=abc"], 2),
    ("vitscope runs --help", ["-m", "vitscope", "runs", "--help"], 0),
    ("import vitscope", ["-c", "import vitscope"], 0),
)


def run_once(arguments: list[str], expected: int) -> tuple[float, float]:
    """Return the wall seconds and the processor seconds of one process.

    Raises:
        RuntimeError: It ended with another exit code.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != expected:
        raise RuntimeError(f"{arguments} ended with {process.returncode}, not {expected}: {process.stderr[-500:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, arguments, expected in COMMANDS:
        run_once(arguments, expected)
        walls, processors = zip(*(run_once(arguments, expected) for _ in range(rounds)))
        print(f"{name:34s} {statistics.median(walls):6.2f} s wall ({min(walls):.2f} to {max(walls):.2f}), "
              f"{statistics.median(processors):6.2f} s processor, median of {rounds}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
