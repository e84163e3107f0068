"""`vs.plot`: the user's axes, sizes, colors, labels, order, titles and parameters."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import rc_context, rcParams
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import vitscope as vs
from tests.fixtures.runs.sample_results import eigenvalues, landscape, loss_slice, variance
from vitscope.plotting import api
from vitscope.plotting.canvas import new_canvas, panels_of
from vitscope.plotting.style import COLORS, KIND_COLORS

TWO = {"ViT": eigenvalues(), "ResNet": eigenvalues(2.0)}


@pytest.fixture(autouse=True)
def _own_parameters() -> Iterator[None]:
    """Leave matplotlib's parameters as they were, and no figure open."""
    with rc_context():
        yield
    plt.close("all")


def curves(figure: Figure) -> dict[str, list[float]]:
    """Return the heights of the labeled curves of the first panel."""
    return {c.get_label(): c.lines[0].get_ydata().tolist() for c in figure.axes[0].containers}


def colors(figure: Figure) -> list[str]:
    return [to_hex(c.lines[0].get_color()) for c in figure.axes[0].containers]


def test_results_are_drawn_under_their_names_in_order() -> None:
    figure = vs.plot(TWO)
    assert curves(figure) == {"ViT": [5.0, -2.0, 1.0], "ResNet": [10.0, -4.0, 2.0]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ViT", "ResNet"]
    assert colors(figure) == [color.lower() for color in COLORS[:2]]
    assert list(curves(vs.plot(list(TWO.values()), labels=["a", "b"]))) == ["a", "b"]
    assert list(curves(vs.plot(TWO, labels={"ViT": "ours"}, order=["ResNet"]))) == ["ResNet", "ours"]
    assert list(curves(vs.plot(list(TWO.values())))) == ["result 1", "result 2"]


def test_colors_are_the_users() -> None:
    assert colors(vs.plot(TWO, colors=["red", "#00ff00"])) == ["#ff0000", "#00ff00"]
    assert colors(vs.plot(TWO, colors={"ResNet": (0, 0, 1)})) == [COLORS[0].lower(), "#0000ff"]
    assert colors(vs.plot(TWO, colors={"ResNet": "red"}, order=["ResNet"])) == ["#ff0000", COLORS[1].lower()]
    assert colors(vs.plot(eigenvalues(), colors="k")) == ["#000000"]
    with rc_context({"axes.prop_cycle": plt.cycler(color=["#111111", "#222222"])}):
        figure = vs.plot(TWO)
    assert colors(figure) == ["#111111", "#222222"]  # also when it is saved under other parameters


@pytest.mark.parametrize("sheet", [None, "ggplot"])
def test_kinds_have_their_own_colors_under_every_style_sheet(sheet: str | None) -> None:
    if sheet:
        plt.style.use(sheet)
    drawn = dict(zip(("Stem", "MSA", "MLP", "Conv"), colors(vs.plot(variance()))))
    assert drawn == {name: KIND_COLORS[name.lower()].lower() for name in drawn}
    assert colors(vs.plot(variance(), colors={"msa": "#123456"}))[1] == "#123456"
    text = inspect.getdoc(vs.style) or ""
    assert all(KIND_COLORS[kind] in text for kind in ("conv", "msa", "mlp", "pool", "stem", "head"))
    assert all(color in text for color in COLORS)


def test_parameters_of_the_user_win_over_the_style() -> None:
    ours = vs.plot(TWO)
    assert ours.axes[0].xaxis.label.get_fontsize() == 8
    assert not ours.axes[0].spines["top"].get_visible()
    assert rcParams["font.size"] == 10  # nothing is left behind
    with rc_context({"font.size": 14, "lines.linewidth": 3, "axes.grid": True}):
        figure = vs.plot(TWO)
    axes = figure.axes[0]
    assert axes.xaxis.label.get_fontsize() == 14
    assert axes.get_xticklabels()[0].get_fontsize() == pytest.approx(14 * 0.833)
    assert figure.legends[0].get_texts()[0].get_fontsize() == pytest.approx(14 * 0.833)
    assert axes.xaxis.get_gridlines()[0].get_visible()
    with rc_context({"figure.figsize": (5, 4)}):
        assert vs.plot(TWO).get_size_inches().tolist() == [5, 4]
    plt.style.use("ggplot")
    sheet = vs.plot(TWO)
    assert to_hex(sheet.axes[0].get_facecolor()) == "#e5e5e5"
    assert colors(sheet)[0] == "#e24a33"


def test_the_style_is_a_context_and_a_sheet() -> None:
    with vs.style(font__size=11) as parameters:
        assert rcParams["font.size"] == 11
        assert rcParams["axes.spines.right"] is False
        with vs.style():
            assert rcParams["font.size"] == 8
        assert rcParams["font.size"] == 11
    assert rcParams["font.size"] == 10
    assert parameters["font.size"] == 11
    for name in ("vitscope.plotting.vitscope", vs.style()):
        with plt.style.context(name):
            assert rcParams["font.size"] == 8
    with pytest.raises(ValueError, match="received font.sise"):
        vs.style(font__sise=1)


def test_a_notebook_shows_a_figure_without_pyplot() -> None:
    assert vs.plot(TWO)._repr_png_().startswith(b"\x89PNG")


def test_axes_of_the_user() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    assert vs.plot(TWO, ax=right) is figure
    assert not left.containers
    assert len(right.containers) == 2
    assert right.get_xlabel() == "Rank by magnitude"
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["ViT", "ResNet"]
    assert right.xaxis.label.get_fontsize() == 10  # the user's parameters, not the style's
    figure.draw_without_rendering()


def test_axes_of_the_user_for_several_panels() -> None:
    figure, panels = plt.subplots(2, 2)
    vs.plot({"a": variance(), "b": variance(2.0)}, ax=panels)
    assert [ax.get_title() for ax in panels.flat] == ["a", "a", "b", "b"]
    assert panels[0, 0].get_ylim() == panels[1, 0].get_ylim()
    text = r"Expected 4 axes, received 1: the figure has 2 rows of 2 panels; pass ax=plt.subplots\(2, 2\)\[1\]"
    with pytest.raises(ValueError, match=text):
        vs.plot({"a": variance(), "b": variance()}, ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="projection='3d', received 'rectilinear'"):
        vs.plot(landscape(), kind="surface", ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="a figure or a subfigure, received str"):
        vs.plot(TWO, ax="axes")
    figure.draw_without_rendering()


def test_a_subfigure_is_filled() -> None:
    figure = plt.figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert vs.plot({"a": variance(), "b": variance()}, ax=left) is figure
    vs.plot(landscape(), ax=right, title=False)
    assert len(left.axes) == 4
    assert left.legends
    assert [ax.name for ax in panels_of(right)][:2] == ["3d", "rectilinear"]
    figure.draw_without_rendering()


def test_sizes_and_titles() -> None:
    assert vs.plot(TWO, figsize=(3.3, 2)).get_size_inches().tolist() == [3.3, 2]
    with pytest.raises(ValueError, match="ax or figsize, received both"):
        vs.plot(TWO, figsize=(3, 2), ax=plt.subplots()[1])
    assert vs.plot(landscape(), kind="contour").axes[0].get_title().startswith("Star: minimum 1 at")
    assert vs.plot(landscape(), kind="contour", title=False).axes[0].get_title() == ""
    assert vs.plot(TWO, title="Top eigenvalues").axes[0].get_title() == "Top eigenvalues"
    both = {"a": landscape(), "b": landscape()}
    assert [ax.get_title() for ax in vs.plot(both, kind="contour", title=False).axes[:2]] == ["a", "b"]
    assert vs.plot(both, title="Two surfaces").get_suptitle() == "Two surfaces"


def test_a_title_does_not_lie_on_a_legend_above_the_panels() -> None:
    canvas = new_canvas(3.4, 3)
    upper, lower = canvas.grid(2, 1)[:, 0]
    upper.plot([1.0], label="a")
    canvas.legend(loc="outside upper center", title="kinds")
    api._set_titles(canvas.figure, [upper, lower], ["a"], "CIFAR-10 (JPEG)")
    assert canvas.figure.get_suptitle() == ""
    assert [legend.get_title().get_text() for legend in canvas.figure.legends] == ["CIFAR-10 (JPEG)\nkinds"]


def test_models_that_are_compared_share_linear_axes() -> None:
    models = {"a": variance(), "b": variance(10.0)}
    panels = vs.plot(models).axes
    assert panels[0].get_ylim() == panels[2].get_ylim()
    assert panels[0].get_yscale() == "linear"
    assert vs.plot(variance()).axes[0].get_yscale() == "log"
    assert vs.plot(models, view="variance", log=True).axes[0].get_yscale() == "log"
    slices = {"a": loss_slice(), "b": loss_slice(10.0)}
    assert vs.plot(slices).axes[0].get_yscale() == "linear"
    assert vs.plot(loss_slice()).axes[0].get_yscale() == "log"
    surfaces = vs.plot({"a": landscape(), "b": landscape(2.0)}, kind="contour").axes
    assert surfaces[0].collections[0].norm.vmax == surfaces[1].collections[0].norm.vmax


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"colour": "red"},
            r"of hessian_eigenvalues \(it has none\) or of every figure \(ax, figsize, colors, labels, ",
        ),
        ({"labels": ["a"]}, r"as many labels as results \(2\), received 1"),
        ({"labels": ["a", "a"]}, "labels that differ, received a, a"),
        ({"labels": {"Vit": "x"}}, "labels to name some of 'ViT', 'ResNet', received 'Vit'"),
        ({"order": ["resnet"]}, "order to name some of 'ViT', 'ResNet', received 'resnet'"),
        ({"colors": ["red"]}, "a color for each of the 2 results, received 1"),
        ({"colors": ["red", "no color"]}, "colors of matplotlib such as '#0072B2', .* received 'no color'"),
        ({"colors": {"attention": "red"}}, "colors to name some of 'ViT', .*'msa'.* received 'attention'"),
    ],
)
def test_what_is_not_understood_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vs.plot(TWO, **options)


class Scored:
    """A result of a measure without a file of plots beside it."""

    def scalars(self) -> dict[str, float]:
        return {}


def test_what_is_no_result_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one result"):
        vs.plot({})
    with pytest.raises(ValueError, match="of one measure, received"):
        vs.plot({"a": eigenvalues(), "b": variance()})
    with pytest.raises(ValueError, match="results of a measure such as .* received ndarray"):
        vs.plot(np.zeros(3))
    with pytest.raises(ValueError, match="results of a measure such as .* received Scored"):
        vs.plot(Scored())
    other = dataclasses.replace(eigenvalues(), card=dataclasses.replace(eigenvalues().card, n_images=9))
    with pytest.raises(ValueError, match="differ in n_images: 8 and 9"):
        vs.plot({"a": eigenvalues(), "b": other})


def test_the_docstring_lists_the_options_of_every_figure() -> None:
    listed: dict[str, list[str]] = {}
    measure = ""
    for line in (inspect.getdoc(vs.plot) or "").partition("====\n")[2].partition("\n====")[0].splitlines():
        name = re.match(r"``(\w+)`` ", line)
        measure = name[1] if name else measure
        rest = line[name.end() :] if name else line
        listed.setdefault(measure, []).extend(re.findall(r"``(\w+)``", rest))
    actual = {}
    for name, module in vs.measures().items():
        draw = getattr(__import__(f"{module.rpartition('.')[0]}.plot", fromlist=["x"]), name, None)
        if draw is not None and (options := api.figure_options(draw)):
            actual[name] = options
    assert listed == actual
