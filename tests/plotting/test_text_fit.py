"""Labels, titles and legends fit into the figure at any size of its fonts."""

from __future__ import annotations

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

import vitscope as vs
from tests.fixtures.runs.sample_results import loss_slice, variance
from vitscope.plotting.text_fit import broken_lines, broken_names, fit_legend, n_legend_lines


@pytest.mark.parametrize(
    ("text", "most", "lines"),
    [
        ("Noise frequency", 20, ["Noise frequency"]),
        ("Noise frequency ($\\times\\pi$ rad/pixel)", 20, ["Noise frequency ($\\times\\pi$", "rad/pixel)"]),
        ("Remainder $v^T (H - G) v$ of it", 16, ["Remainder", "$v^T (H - G) v$ of", "it"]),
        ("name\nA second line", 10, ["name", "A second", "line"]),
        ("blocks.1.attention.projection", 10, ["blocks.1.attention.projection"]),
    ],
)
def test_lines_are_broken_at_spaces(text: str, most: int, lines: list[str]) -> None:
    assert broken_lines(text, most).split("\n") == lines


@pytest.mark.parametrize(
    ("text", "most", "lines"),
    [
        ("layers.3.blocks.1.mlp", 18, ["layers.3.blocks.1.", "mlp"]),
        ("layers.3.blocks.1.mlp", 40, ["layers.3.blocks.1.mlp"]),
        ("AlterNet of 2 epochs", 12, ["AlterNet of", "2 epochs"]),
        ("Rollout\nof gradients", 20, ["Rollout", "of gradients"]),
        ("encoder.attention_projection.key", 10, ["encoder.", "attention_projection.", "key"]),
    ],
)
def test_names_are_broken_after_dots_and_at_spaces(text: str, most: int, lines: list[str]) -> None:
    assert broken_names(text, most).split("\n") == lines


def test_a_legend_has_the_columns_that_fit() -> None:
    with rc_context({"legend.fontsize": 8}):
        assert fit_legend(["ViT", "ResNet", "Swin"], 3, 3.4) == (["ViT", "ResNet", "Swin"], 3)
        assert fit_legend(["a model of a long name"] * 4, 4, 3.4)[1] == 2
        labels, columns = fit_legend(["a name that is far too long for one line of a single column of a page"], 2, 3.4)
    assert columns == 1
    assert labels[0].count("\n") == 1


def inside(figure: Figure) -> bool:
    """Tell whether the labels of all axes and the legend lie within the figure."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    texts = [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label, ax.title)]
    items = [*(text for text in texts if text.get_text()), *figure.legends]
    boxes = [item.get_window_extent() for item in items]
    return all(box.x0 >= -2 and box.y0 >= -2 and box.x1 <= width + 2 and box.y1 <= height + 2 for box in boxes)


def test_labels_stay_inside_of_one_column() -> None:
    with rc_context({"font.size": 12}):
        assert inside(vs.plot(loss_slice(), figsize=(3.3, 2.4)))
        assert inside(vs.plot(variance(), view="ratio", figsize=(3.3, 2.8)))


@pytest.mark.parametrize(
    ("labels", "n_columns", "n_lines"),
    [([], 1, 0), (["a"], 2, 1), (["a", "b", "c"], 2, 2), (["a", "b\nb", "c"], 2, 3), (["a", "b", "c\nc\nc"], 2, 3)],
)
def test_a_legend_is_as_high_as_its_highest_column(labels: list[str], n_columns: int, n_lines: int) -> None:
    assert n_legend_lines(labels, n_columns) == n_lines
