"""The style that figures share."""

from __future__ import annotations

import numpy as np
from matplotlib import rcParams, style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from vitscope.plotting.api import STYLE
from vitscope.plotting.canvas import Canvas, result_color
from vitscope.plotting.depth_axis import points_by_kind, shade_bands, shared_legend, start_at_zero
from vitscope.plotting.style import COLORS, KIND_COLORS, KIND_LABELS, KIND_MARKERS, MARKERS

KINDS = ("stem", "conv", "msa", "conv", "pool")
DEPTHS = np.linspace(0, 1, 5)


def test_colors_are_those_of_the_style_sheet() -> None:
    with style.context(STYLE):
        cycle = [to_hex(color).upper() for color in rcParams["axes.prop_cycle"].by_key()["color"]]
    assert list(COLORS) == cycle[: len(COLORS)]
    kinds = {"stem", "conv", "msa", "mlp", "pool", "head", "unknown"}
    assert set(KIND_COLORS) == set(KIND_MARKERS) == set(KIND_LABELS) == kinds
    assert [KIND_COLORS[kind] for kind in ("conv", "msa", "mlp")] == ["#0072B2", "#D55E00", "#009E73"]
    assert len(set(KIND_COLORS.values())) == len(set(KIND_MARKERS.values())) == len(kinds)


def test_no_two_of_many_models_have_one_color_and_one_marker() -> None:
    with style.context(STYLE):
        looks = {(result_color(index), MARKERS[index % len(MARKERS)]) for index in range(56)}
    assert len(looks) == 56


def test_bands_stand_behind_attention_pooling_and_subsampling() -> None:
    ax = Figure().subplots()
    shade_bands(ax, DEPTHS, KINDS, [False, False, False, True, False])
    spans = [(patch.get_x(), patch.get_width(), patch.get_label()) for patch in ax.patches]
    blue = "Pooling, subsampling"
    assert spans == [(0.25, 0.25, "MSA block"), (0.5, 0.25, blue), (0.75, 0.25, blue)]
    unlabeled = Figure().subplots()
    shade_bands(unlabeled, DEPTHS, KINDS, [False] * 5, labels=False)
    assert len(unlabeled.patches) == 2
    assert unlabeled.get_legend_handles_labels() == ([], [])


def test_points_without_a_value_are_left_out_and_labels_stand_once() -> None:
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    for ax in axes:
        points_by_kind(ax, DEPTHS, KINDS, values, np.full(5, 0.1))
    shared_legend(Canvas(figure), axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Stem", "Conv", "Pooling"]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes[0].containers}
    assert drawn == {"Stem": [1.0], "Conv": [2.0, 4.0], "Pooling": [5.0]}
    empty = Figure()
    shared_legend(Canvas(empty), [empty.subplots()])
    assert not empty.legends


def test_an_axis_from_zero_leaves_room_above_values_that_are_nearly_equal() -> None:
    ax = Figure().subplots()
    ax.plot(DEPTHS, [0.83, 0.8301, 0.83, 0.8299, 0.83])
    start_at_zero(ax)
    assert ax.get_ylim() == (0, 1.08 * 0.8301)
    start_at_zero(ax, highest=0.85)
    assert ax.get_ylim() == (0, 0.85)
    for values in ([], [np.nan] * 5, [0.0] * 5):
        empty = Figure().subplots()
        empty.plot(DEPTHS[: len(values)], values)
        start_at_zero(empty)
        assert empty.get_ylim() == (0, 1)
