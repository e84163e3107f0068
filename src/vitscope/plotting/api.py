"""`vs.plot`: find a result's figure in its topic, check that results may share it, apply the package's style."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from vitscope.core.objective_card import check_comparable
from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import temporary_path

STYLE = Path(__file__).with_name("vitscope.mplstyle")


def plot(results: Any, *, allow_different: bool = False, **options: Any) -> Figure:
    """Draw one result, or several of one measure by name in one figure.

    Args:
        results: a result, or a mapping from the name shown in the legend to a result.
        allow_different: overlay results whose objective cards differ.
        options: passed to the topic's plot function.

    Raises:
        ValueError: nothing to draw, results of several measures, or objectives that differ.
    """
    named: Mapping[str, Any] = results if isinstance(results, Mapping) else {"": results}
    modules = {type(result).__module__ for result in named.values()}
    if len(modules) != 1:
        raise ValueError(f"Expected results of one measure, received {sorted(modules) or 'none'}.")
    if not allow_different:
        check_comparable({name: getattr(result, "card", None) for name, result in named.items()})
    topic, _, measure = modules.pop().rpartition(".")
    draw = getattr(importlib.import_module(f"{topic}.plot"), measure)
    with style.context(STYLE):
        return draw(named, **options)


def save_figure(figure: Figure, stem: Path, *, formats: Sequence[str] = ("png", "pdf")) -> tuple[Path, ...]:
    """Write ``<stem>.png`` (300 dots an inch) and ``<stem>.pdf``, or the formats asked for; return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = tuple(stem.with_name(f"{stem.name}.{ending}") for ending in formats)
    engine = figure.get_layout_engine()
    with style.context(STYLE):
        for path in paths:
            safe_files.refuse_links(path)
            temporary = temporary_path(path)  # a kill leaves the file of before, or this one
            temporary.unlink(missing_ok=True)  # never through a link that waits under that name
            figure.savefig(temporary, dpi=300, format=path.suffix[1:])
            os.replace(temporary, path)
            figure.set_layout_engine("none")  # laid out once: again for each file would cost a fifth of the time
    figure.set_layout_engine(engine)
    return paths
