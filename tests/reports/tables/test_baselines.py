from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.fixtures.runs.report_runs import curve, other_card
from vitscope.reports import run_entry, run_index
from vitscope.reports.figures import figure_captions, figure_worker
from vitscope.reports.tables import baselines
from vitscope.runs import run_search


def collect(root: Path) -> list[run_entry.Entry]:
    return run_index.collect(run_search.every(root / "runs"))


def test_a_model_stands_beside_its_initialization_and_random_labels(make_run: Callable, tmp_path: Path) -> None:
    for seed in (1, 0):
        make_run("vit", seed, data__random_labels=False, measured={"slice": curve(), "slice@init": curve(depth=2.0)})
    random = make_run("vit", 0, data__random_labels=True, measured={"slice": curve(), "slice@init": curve(depth=2.0)})
    made, lacking = baselines.panels(collect(tmp_path))
    assert lacking == []
    (panel,) = made
    assert (panel.name, panel.notice) == ("slice-baselines-vit-tiny", "vit-tiny")
    assert [c.label for c in panel.curves] == ["trained", "at initialization", "trained on random labels"]
    assert [(c.entry.seed, len(c.others)) for c in panel.curves] == [(0, 1), (0, 1), (0, 0)]
    assert panel.curves[2].entry.id == random.id
    picture = figure_worker.draw(figure_captions.drawing_job(panel, tmp_path / "figures"))
    assert picture.problem == ""
    assert picture.labels == ("trained", "at initialization", "trained on random labels")


def test_random_labels_are_those_that_a_model_was_trained_on(make_run: Callable, tmp_path: Path) -> None:
    """Before its first step a model has not seen its labels: what was measured then is no baseline of their kind."""
    make_run("vit", data__random_labels=False, measured={"slice": curve()})
    run = make_run("vit", data__random_labels=True, measured={"slice": curve(), "slice@init": curve()})
    (first,) = (run.results / "slice").glob("init-*.json")
    os.utime(first, (2e9, 2e9))  # measured last
    (panel,), _ = baselines.panels(collect(tmp_path))
    assert [(c.label, c.measured.tag) for c in panel.curves] == [
        ("trained", "end"),
        ("trained on random labels", "end"),
    ]


def test_random_training_labels_are_no_other_condition(make_run: Callable, tmp_path: Path) -> None:
    """A measure on the training split has the labels on its card; they are what this baseline differs in."""
    make_run("vit", data__random_labels=False, measured={"slice": curve(other_card(data="photos"))})
    random = other_card(data="photos, random labels")
    make_run("vit", data__random_labels=True, measured={"slice": curve(random)})
    (panel,), _ = baselines.panels(collect(tmp_path))
    assert [c.label for c in panel.curves] == ["trained", "trained on random labels"]


def test_labels_say_which_labels_a_model_was_trained_on(make_run: Callable, tmp_path: Path) -> None:
    for random in (False, True):
        make_run("vit", data__random_labels=random, measured={"slice": curve()})
    assert sorted(entry.label for entry in collect(tmp_path)) == ["vit-tiny, random labels", "vit-tiny, true labels"]


def test_other_models_and_other_conditions_are_no_baselines(make_run: Callable, tmp_path: Path) -> None:
    other = other_card(data="digits, random labels")
    run = make_run("vit", data__random_labels=False, measured={"slice": curve(), "slice@init": curve()})
    make_run("vit", data__random_labels=True, measured={"slice": curve(other)})
    make_run("vit", data__random_labels=True, model__depth=2, measured={"slice": curve()})
    made, (problem,) = baselines.panels(collect(tmp_path))
    assert [c.label for c in made[0].curves] == ["trained", "at initialization"]
    assert str(problem) == (
        f"missing: run {run.id}: slice trained on random labels (measured under another objective card (data))"
    )
    made, lacking = baselines.panels(collect(tmp_path), allow_different=True)
    assert (len(made[0].curves), lacking) == (3, [])


def test_what_is_not_measured_is_named_with_its_remedy(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit", measured={"slice": curve()})
    assert baselines.panels(collect(tmp_path)) == ([], [])  # nothing was asked for by name
    made, lacking = baselines.panels(collect(tmp_path), ["slice"])
    assert made == []
    assert [str(p) for p in lacking] == [
        f"missing: run {run.id}: slice at initialization (to have it: python analyze.py run={run.path} ckpt=init "
        "'analysis=[slice]')",
        f"missing: run {run.id}: slice trained on random labels (to have it: train the same with data.random_labels=true)",
    ]
