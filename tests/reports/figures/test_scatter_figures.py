"""Numbers over numbers and over keys of the configuration: read, averaged over seeds, and missed by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from tests.fixtures.runs.report_runs import curve, other_card, spectrum
from vitscope.config import loading
from vitscope.reports import run_index
from vitscope.reports.figures import run_correlations, scatter_figures
from vitscope.reports.value_lookup import Selection
from vitscope.runs import run_search
from vitscope.stats.t_tests import Interval, t_interval


def selection(root: Path) -> Selection:
    return Selection(run_index.collect(run_search.every(root / "runs")))


def test_a_key_on_the_axis_and_seeds_averaged(make_run: Callable, tmp_path: Path) -> None:
    for fraction, accuracies in {0.1: (0.2, 0.4), 1.0: (0.7, 0.8)}.items():
        for seed, accuracy in enumerate(accuracies):
            make_run("vit", seed, data__fraction=fraction, metrics={"test/accuracy": accuracy})
    points, table = scatter_figures.collect(selection(tmp_path), "data.fraction", ("1-test/accuracy",), "numbers")
    assert {p.x: p.y[0].mean for p in points if p.y[0]} == pytest.approx({0.1: 0.7, 1.0: 0.25}, rel=1e-12)
    widths = {p.x: p.y[0].half_width for p in points if p.y[0]}
    assert widths == pytest.approx(
        {0.1: t_interval([0.8, 0.6]).half_width, 1.0: t_interval([0.3, 0.2]).half_width}, rel=1e-9
    )
    assert {p.series for p in points} == {"vit-tiny"}  # one line: the key on the axis does not divide it
    assert table.problems == ()
    figure = scatter_figures.draw(points, "data.fraction", ("1-test/accuracy",))
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [0.1, 1.0])
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [0.7, 0.25])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0.1", "1"]


def test_a_number_on_the_axis(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", measured={"slice": curve()})
    make_run("convnet", measured={"slice": curve()}, metrics={"test/accuracy": 0.9})
    points, _ = scatter_figures.collect(selection(tmp_path), "slice.nll_center", ("1-test/accuracy",), "numbers")
    assert all(isinstance(p.x, Interval) and p.x.mean == 0.5 for p in points)
    assert {p.series: p.y[0].mean for p in points if p.y[0]} == pytest.approx({"vit-tiny": 0.5, "convnet-18": 0.1})
    assert len(scatter_figures.draw(points, "slice.nll_center", ("1-test/accuracy",)).axes) == 1


def test_a_missing_number_is_named_by_its_quantity(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", measured={"slice": curve()}, metrics={"test/nll": 1.0})
    make_run("convnet", metrics={"test/accuracy": 0.9})
    _, table = scatter_figures.collect(selection(tmp_path), "slice.nll_center", ("test/accuracy",), "numbers")
    assert sorted(problem.metric for problem in table.problems) == ["slice.nll_center", "test/accuracy"]


def test_categories_keep_numbers_first(make_run: Callable, tmp_path: Path) -> None:
    for kernel in (5, "global", 3):
        make_run("convit", model__kernel_size=kernel)
    points, _ = scatter_figures.collect(selection(tmp_path), "model.kernel_size", ("test/accuracy",), "numbers")
    figure = scatter_figures.draw(points, "model.kernel_size", ("test/accuracy",))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "5", "global"]
    assert axes.lines[0].get_linestyle() == "None"  # nothing lies between categories
    assert axes.get_ylim()[0] <= 0
    assert [text.get_text() for text in axes.texts] == ["No interval: one seed"]


def test_objectives_by_their_names(make_run: Callable, tmp_path: Path) -> None:
    for name in ("weak", "strong"):
        node = OmegaConf.to_container(OmegaConf.load(loading.folder() / "objective" / f"{name}.yaml"))
        make_run("vit", objective=node)
    make_run("vit", objective={"augment": "none"})
    points, _ = scatter_figures.collect(selection(tmp_path), "objective", ("test/accuracy",), "numbers")
    assert sorted(p.x for p in points) == ["other", "strong", "weak"]
    assert {p.series.split(", ")[0] for p in points} == {"vit-tiny"}


def test_what_is_missing_is_named_and_not_drawn(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", name="good", measured={"hessian": spectrum(ape=100.0)})
    make_run("vit", name="nan", model__heads=1, measured={"hessian": spectrum(ape=float("nan"))})
    make_run("vit", name="failed", model__heads=2, measured={"hessian": "out of memory"})
    make_run("vit", name="absent", model__heads=3)
    quantity = "hessian.average_positive_eigenvalue"
    points, table = scatter_figures.collect(selection(tmp_path), "model.heads", (quantity,), "numbers")
    said = {str(problem) for problem in table.problems}
    assert said == {
        f"failed: run nan: {quantity} (not finite)",
        f"failed: run failed: {quantity} (out of memory)",
        f"missing: run absent: {quantity} (not measured at end)",
    }
    drawn = scatter_figures.draw(points, "model.heads", (quantity,)).axes[0].lines[0]
    assert np.asarray(drawn.get_ydata(), float).tolist() == [100.0]  # at "default"


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="at least one experiment"):
        scatter_figures.draw([], "x", ("y",))


def test_a_number_of_other_options_is_no_point_of_the_figure(make_run: Callable, tmp_path: Path) -> None:
    nep = "hessian.negative_eigenvalue_proportion"
    for patch, solver in ((2, "lanczos"), (4, "lanczos"), (8, "power")):
        card = other_card(options={"solver": solver}, augmentation=f"recipe {patch}")  # what the runs vary may differ
        make_run("vit", model__patch_size=patch, measured={"hessian": spectrum(0.1 * patch, card=card)})
    points, table = scatter_figures.collect(selection(tmp_path), "model.patch_size", (nep,), "numbers")
    assert {p.x: p.y[0].mean for p in points if p.y[0]} == pytest.approx({2: 0.2, 4: 0.4})
    (problem,) = table.problems
    assert "options.solver 'power', most runs 'lanczos'" in str(problem)


def test_rank_correlation_over_single_runs(make_run: Callable, tmp_path: Path) -> None:
    gaps = [0.05, 0.1, 0.12, 0.2, 0.22, 0.3, 0.31, 0.4]
    heights = [1.0, 3.0, 2.0, 4.0, 6.0, 5.0, 7.0, 8.0]
    for k, (gap, height) in enumerate(zip(gaps, heights)):
        metrics = {"train/accuracy": 0.9, "test/accuracy": 0.9 - gap, "test/nll": height}
        make_run(model="vit" if k % 2 else "convnet", seed=k, metrics=metrics)
    chosen, x = selection(tmp_path), "train/accuracy-test/accuracy"
    points, table = scatter_figures.collect(chosen, x, ["test/nll"], "numbers")
    assert not table.problems
    assert isinstance(points[0].x, Interval)
    found = run_correlations.correlations(chosen, x, ["test/nll", "val/unknown"])
    expected = stats.kendalltau(gaps, heights)
    assert found["test/nll"].tau == pytest.approx(expected.statistic, abs=1e-12)
    assert found["test/nll"].n == 8
    assert found["test/nll"].low < expected.statistic < found["test/nll"].high
    assert found["val/unknown"].n == 0
    cells = run_correlations.table(found, x, "correlations").rows
    assert [cell.text for cell in cells[0]][1] == f"{expected.statistic:.2f}"
    assert [cell.text for cell in cells[1]][1:] == ["–", "–", "–", "–", "0"]
    figure = scatter_figures.draw(points, x, ["test/nll"], [run_correlations.text(found["test/nll"])])
    assert figure.axes[0].get_title().startswith("tau = 0.86 [")
    assert figure.axes[0].get_xlabel() == "accuracy in the last epoch, augmented, minus test accuracy"
    assert run_correlations.correlations(chosen, "model.depth", ["test/nll"]) == {}


def test_many_points_of_one_category_stay_in_its_share_of_the_axis(make_run: Callable, tmp_path: Path) -> None:
    """Twenty models of three kernels once stood up to 1.1 places beside their own."""
    for depth in range(1, 21):
        for kernel in (3, "global"):
            make_run("convit", model__kernel_size=kernel, model__depth=depth, metrics={"test/accuracy": depth / 100})
    points, _ = scatter_figures.collect(selection(tmp_path), "model.kernel_size", ("test/accuracy",), "numbers")
    axes = scatter_figures.draw(points, "model.kernel_size", ("test/accuracy",)).axes[0]
    places = np.array([drawn.lines[0].get_xdata() for drawn in axes.containers], float)  # (models, kernels)
    assert places.shape == (20, 2)
    np.testing.assert_allclose(places[:, 1] - places[:, 0], 1.0, rtol=1e-12)
    np.testing.assert_allclose(places[:, 0], 0.04 * (np.arange(20) - 9.5), rtol=1e-12, atol=1e-15)
    assert (axes.get_xlim()[0], axes.get_xlim()[1]) == (-0.5, 1.5)


def test_a_model_of_two_recipes_is_one_series_over_objectives(make_run: Callable, tmp_path: Path) -> None:
    for name in ("weak", "strong"):
        recipe = OmegaConf.to_container(OmegaConf.load(loading.folder() / "objective" / f"{name}.yaml"))
        for model in ("vit", "convnet"):
            make_run(model, objective=recipe)
    points, _ = scatter_figures.collect(selection(tmp_path), "objective", ("test/accuracy",), "numbers")
    assert {(point.series, point.x) for point in points} == {
        (series, name) for series in ("vit-tiny", "convnet-18") for name in ("weak", "strong")
    }


def test_a_legend_of_long_names_is_inside_the_figure(make_run: Callable, tmp_path: Path) -> None:
    for index in range(12):
        make_run("vit", model__depth=index + 1, model__size=f"a name of a model that is longer than others {index}")
    points, _ = scatter_figures.collect(selection(tmp_path), "model.depth", ("test/accuracy",), "numbers")
    figure = scatter_figures.draw(points, "model.depth", ("test/accuracy",))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent().transformed(figure.transFigure.inverted())
    assert (box.x0, box.y0) >= (0, 0)
    assert box.x1 <= 1
    assert box.y1 <= 1
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1.2


def test_a_panel_without_a_number_says_so(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (0.1, 1.0):
        make_run("vit", data__fraction=fraction)
    y = ("test/accuracy", "slice.nll_center")
    points, _ = scatter_figures.collect(selection(tmp_path), "data.fraction", y, "numbers")
    there, missing = scatter_figures.draw(points, "data.fraction", y).axes
    assert [text.get_text() for text in missing.texts] == ["missing"]
    assert list(missing.get_xticks()) == list(missing.get_yticks()) == []
    assert [text.get_text() for text in there.texts] == ["No interval: one seed"]


def test_points_without_an_interval_among_others_are_said(make_run: Callable, tmp_path: Path) -> None:
    for seed in range(3):
        make_run("vit", seed, data__fraction=0.1, metrics={"test/accuracy": 0.1 * seed})
    make_run("vit", 0, data__fraction=1.0)
    points, _ = scatter_figures.collect(selection(tmp_path), "data.fraction", ("test/accuracy",), "numbers")
    axes = scatter_figures.draw(points, "data.fraction", ("test/accuracy",)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["Without bar: fewer than 3 seeds"]
