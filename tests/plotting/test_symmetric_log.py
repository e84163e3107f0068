"""Symmetric logarithmic axes: labels apart from each other, linear only where values are tiny or zero."""

from __future__ import annotations

from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogTransform

import vitscope as vs
from vitscope.plotting.symmetric_log import symmetric_log_x_axis

VALUES = {
    "one decade": [1.5, 9.0],
    "both signs": [-300.0, -0.02, 0.5, 800.0],
    "twelve decades": [-1e-9, 1e-6, 1e3],
    "negative": [-5.0, -0.001],
    "one value": [42.0],
    "with zeros": [0.0, 0.0, 75.0],
    "not finite": [np.nan, 3.0, np.inf],
}


def drawn(values: list[float]) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure((2.8, 1.5))
    figure.set_layout_engine("none")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.3, 0.85, 0.6))
    array = np.asarray(values)
    axes.plot(array[np.isfinite(array)], np.zeros(np.isfinite(array).sum()), "|")
    symmetric_log_x_axis(axes, np.abs(array), [array])
    canvas.draw()
    return figure, canvas


@pytest.mark.parametrize("values", list(VALUES.values()), ids=list(VALUES))
def test_labels_do_not_touch(values: list[float]) -> None:
    with matplotlib.rc_context(vs.style()):
        figure, canvas = drawn(values)
    axis = figure.axes[0].xaxis
    low, high = sorted(axis.get_view_interval())
    labels = [t for t in axis.get_ticklabels() if low <= t.get_position()[0] <= high and t.get_text()]
    boxes = sorted((t.get_window_extent(canvas.get_renderer()) for t in labels), key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert len(labels) > 1  # zero and a power of ten


def linear_threshold(figure: Figure) -> float:
    transform = figure.axes[0].xaxis.get_transform()
    assert isinstance(transform, SymmetricalLogTransform)
    return transform.linthresh


def test_the_linear_part_lies_at_most_six_decades_below_the_largest_value() -> None:
    figure, _ = drawn([-1e-9, 1e-6, 1e3])
    assert linear_threshold(figure) == 1e-3
    figure, _ = drawn([0.02, 800.0])
    assert linear_threshold(figure) == 1e-2


def test_zeros_alone_are_drawn_on_a_linear_axis() -> None:
    figure, _ = drawn([0.0, 0.0])
    assert figure.axes[0].get_xscale() == "linear"
