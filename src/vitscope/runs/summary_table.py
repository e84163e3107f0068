"""Print the folder, the headline numbers and the figures of a run at the end of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror

_FIRST = ("test/accuracy", "test/nll", "test/ece", "val/accuracy", "train/loss")
_MOST_FIGURES = 8
_LEFT_OUT = ("step", "epoch", "time", "tag", "trainer/global_step", "lr-")


def headline_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return ``(metric, number)`` of what is worth a look, the test metrics first."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not k.startswith(_LEFT_OUT)}
    order = [k for k in _FIRST if k in numbers]
    order += sorted(k for k in numbers if k not in order and k.split("/")[0] not in ("train", "val"))
    return [(key, f"{numbers[key]:.4g}") for key in order]


def _figure_list(run: Run, names: Sequence[str]) -> str:
    """Return the path of a figure, or the folder of several with the first names."""
    if len(names) == 1:
        return str(run.figures / names[0])
    more = f" and {len(names) - _MOST_FIGURES} more" if len(names) > _MOST_FIGURES else ""
    return f"{run.figures}: {', '.join(names[:_MOST_FIGURES])}{more}"


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
    if names := sorted(path.name for path in run.figures.glob("*.png")):
        print(f"figures (PDF and CSV beside each): {_figure_list(run, names)}")
    if mirror.url:
        print(f"W&B: {mirror.url}")
    mirror.table("headline", ["metric", "value"], [list(row) for row in headline])
