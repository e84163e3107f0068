"""Print the folder and the headline numbers of a run at the end of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror

_FIRST = ("test/accuracy", "test/nll", "test/ece", "val/accuracy", "train/loss")
_LEFT_OUT = ("step", "epoch", "time", "tag", "trainer/global_step", "lr-")


def headline_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return ``(metric, number)`` of what is worth a look, the test metrics first."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not k.startswith(_LEFT_OUT)}
    order = [k for k in _FIRST if k in numbers]
    order += sorted(k for k in numbers if k not in order and k.split("/")[0] not in ("train", "val"))
    return [(key, f"{numbers[key]:.4g}") for key in order]


def print_headline(run: Run, values: Mapping[str, Any], mirror: WandbMirror) -> None:
    """Print the table and log it."""
    headline = headline_rows(values)
    table = Table(title=f"{run.id}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, number in headline:
        table.add_row(name, number)
    Console(width=None).print(table)
    print(f"run folder: {run.path}")
    if mirror.url:
        print(f"W&B: {mirror.url}")
    mirror.table("headline", ["metric", "value"], [list(row) for row in headline])
