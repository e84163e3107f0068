"""Scalars of analyses over the steps at which a training measured them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.fixtures.runs.report_runs import other_card, spectrum
from vitscope.reports import run_index
from vitscope.reports.figures.figure_plan import PER_FIGURE, panels
from vitscope.reports.figures.step_histories import draw, draw_history, step_histories
from vitscope.reports.measured_results import moment
from vitscope.runs import run_search


def stepwise(shift: float = 0.0, steps=(10, 120, 1000000)) -> dict:
    """Results before the first step, at steps, and at the end, whose card states its step."""
    results = {f"hessian@step-{step:06d}": spectrum(ape=shift + i) for i, step in enumerate(steps, 1)}
    return {
        "hessian@init": spectrum(ape=shift),
        **results,
        "hessian": spectrum(card=other_card(step=2000000), ape=shift + 9),
    }


def collect(root: Path) -> list:
    return run_index.collect(run_search.every(root / "runs"))


def test_moments_are_in_the_order_of_steps():
    tags = ["end", "epoch-0001", "step-1000000", "step-000120", "init", "best", "step-00000004"]
    assert sorted(tags, key=moment) == [
        "init", "step-00000004", "step-000120", "step-1000000", "best", "epoch-0001", "end"
    ]  # fmt: skip


def test_scalars_stand_over_their_steps(make_run, tmp_path):
    make_run("vit", 1, measured=stepwise(50.0))
    make_run("vit", 0, measured=stepwise(100.0))
    make_run("convnet", measured=stepwise())
    make_run("pit", measured={"hessian": spectrum()})  # one moment is no course
    (history,) = step_histories(collect(tmp_path))
    assert history.name == "hessian-steps"
    assert {label: entry.seed for label, entry in history.entries.items()} == {"convnet-18": 0, "vit-tiny": 0}
    figure = draw(history)
    axes = {ax.get_ylabel().replace("\n", " "): ax for ax in figure.axes if ax.get_ylabel()}
    assert set(axes) == {"average positive eigenvalue", "top1 average positive eigenvalue", "eigenvalue max"}
    convnet, vit = axes["average positive eigenvalue"].lines
    np.testing.assert_array_equal(convnet.get_xdata(), [0, 10, 120, 1000000, 2000000])
    np.testing.assert_array_equal(vit.get_ydata(), [100, 101, 102, 103, 109])
    drawn = draw_history(history, tmp_path / "out")
    assert drawn.picture.png is not None
    assert drawn.picture.csv is not None
    rows = list(csv.DictReader(drawn.picture.csv.read_text().splitlines()))
    values = {
        (row["name"], int(row["step"])): float(row["value"])
        for row in rows
        if row["quantity"] == "average_positive_eigenvalue"
    }
    assert values["vit-tiny", 120] == 102
    assert step_histories(collect(tmp_path), analyses=["slice"]) == []


def test_results_of_other_conditions_have_a_figure_of_their_own(make_run, tmp_path):
    make_run("vit", measured=stepwise())
    other = other_card(n_images=64)
    make_run("convnet", measured={f"hessian@step-00000{i}": spectrum(card=other) for i in range(1, 4)})
    histories = step_histories(collect(tmp_path))
    assert [history.name for history in histories] == ["hessian-steps", "hessian-steps-2"]
    assert sorted(label for history in histories for label in history.results) == ["convnet-18", "vit-tiny"]


def test_many_steps_are_thinned_where_every_moment_is_drawn(make_run, tmp_path):
    make_run("vit", measured=stepwise(steps=range(10, 310, 10)))
    planned = panels(collect(tmp_path), tag="all")
    steps = sorted(p.tag for p in planned if p.tag.startswith("step-"))
    assert len(steps) == PER_FIGURE
    assert (steps[0], steps[-1]) == ("step-000010", "step-000300")
    assert [p.tag for p in panels(collect(tmp_path), tag="step-000020")] == ["step-000020"]
    assert [p.tag for p in panels(collect(tmp_path))] == ["end"]
