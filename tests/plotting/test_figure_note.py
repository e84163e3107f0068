"""A note below a figure covers nothing of it."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

import vitscope as vs
from tests.fixtures.runs.sample_results import loss_slice, variance
from vitscope.plotting.figure_note import add_note


def note_and_others(figure: Figure, note: str) -> None:
    height = figure.get_figheight()
    text = add_note(figure, note)
    figure.draw_without_rendering()
    box = text.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    others = [*figure.legends, *figure.axes]
    assert others
    lowest_axes = min(axes.get_tightbbox().y0 for axes in figure.axes)
    assert all(legend.get_window_extent().y1 <= lowest_axes for legend in figure.legends)
    lowest = min(other.get_tightbbox().y0 for other in others)
    assert box.y1 <= lowest
    assert figure.get_figheight() - height < 0.5


@pytest.mark.parametrize(
    "note", ["shown: seed 0 of 2 seeds", "shown: " + "; ".join(f"vit, depth {i}: seed 0 of 2 seeds" for i in range(6))]
)
def test_a_note_is_below_a_legend_at_the_lower_edge(note: str) -> None:
    note_and_others(vs.plot({"a": variance(), "b": variance()}), note)


def test_a_note_is_below_axes_without_a_legend() -> None:
    note_and_others(vs.plot(loss_slice()), "shown: seed 0 of 2 seeds")
