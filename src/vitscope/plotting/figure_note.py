"""A note in small print below a finished figure."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from vitscope.plotting.text_fit import broken_lines, most_characters

#: size of the note in points
_POINTS = 6.0
#: inches of a line of the note, and of the space around all of its lines
_LINE, _MARGIN = 0.1, 0.06


def add_note(figure: Figure, note: str) -> Text:
    """Write a note at the right of the lower edge; the figure grows by its lines, so that it covers no legend and no axes.

    Args:
        figure: A figure whose axes and legends are all there.
        note: One line, which is broken where the figure is narrower.

    Returns:
        The note.
    """
    width, height = figure.get_size_inches()
    text = broken_lines(note, most_characters(0.98 * width, _POINTS))
    strip = _MARGIN + _LINE * (text.count("\n") + 1)
    figure.draw_without_rendering()  # lays it out, which tells where its legends are
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    lowest_axes = min((box.y0 for box in boxes if box is not None), default=0.0)  # None of one that is not shown
    below = [legend for legend in figure.legends if legend.get_window_extent().y1 <= lowest_axes]
    legend_height = max((legend.get_window_extent().height / figure.dpi for legend in below), default=0.0)
    figure.set_figheight(height + strip)
    share = strip / (height + strip)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):  # which leaves no space for a legend that has a place of its own
        bottom = share + legend_height / (height + strip)
        engine.set(rect=(0.0, bottom, 1.0, 1.0 - bottom))
    for legend in below:
        legend.set_bbox_to_anchor((0.0, share, 1.0, 1.0 - share), transform=figure.transFigure)
    return figure.text(
        0.99, 0.3 * _MARGIN / (height + strip), text, ha="right", va="bottom", fontsize=_POINTS, color="0.4"
    )
