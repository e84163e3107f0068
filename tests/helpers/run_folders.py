"""Reading of run folders in tests."""

from __future__ import annotations

from pathlib import Path

from vitscope.runs import metrics_log


def only_run(root: Path) -> Path:
    (run,) = (path for path in (root / "runs").iterdir() if path.is_dir())
    return run


def losses(run: Path) -> dict[int, str]:
    """Return each step's loss as hexadecimal digits, the last writing of a step."""
    return {
        row["step"]: float(row["train/loss"]).hex()
        for row in metrics_log.read(run / "metrics.jsonl")
        if "train/loss" in row
    }
