"""Which result of a run a report takes its number from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.report_runs import evaluation, other_card, rise, spectrum
from vitscope.reports import run_index
from vitscope.reports.measured_results import moment
from vitscope.reports.value_lookup import Selection
from vitscope.runs import result_store, run_search
from vitscope.runs.run_dir import Run

SPECTRUM, NEP = "hessian_max_eigenvalue_spectrum", "negative_eigenvalue_proportion"
ANALYZED = {"command": "analyze"}


def select(root: Path, **options: Any) -> Selection:
    return Selection(run_index.collect(run_search.every(root / "runs")), **options)


def add_result(run: Run, stem: str, result: Any, time: float) -> None:
    """Add a Hessian result with the time of its file."""
    folder = run.results / "hessian"
    result_store.save(folder, stem, result)
    os.utime(folder / f"{stem}.json", (time, time))


@pytest.mark.parametrize(
    ("split", "options", "number"),
    [
        ("test", {}, 0.7),
        ("test", {"classes": "all"}, 0.7),
        ("test", {"classes": "present"}, None),  # of an ImageNet-A, whose absent classes are masked
        ("train", {}, None),
        ("val", {}, None),
    ],
)
def test_accuracy_of_a_model_trained_elsewhere_is_that_on_its_split_over_all_classes(
    make_run: Callable, tmp_path: Path, split: str, options: dict[str, Any], number: float | None
) -> None:
    result = evaluation(0.7)
    card = dataclasses.replace(result.card, split=split, options=options)
    measured = {"evaluation": dataclasses.replace(result, card=card)}
    make_run("vit", facts=ANALYZED, metrics={"val/loss": 1.0}, measured=measured)
    selection = select(tmp_path)
    assert selection.metric(selection.entries[0], "test/accuracy").number == number


def test_metrics_of_a_training_are_its_own_and_no_evaluations(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", metrics={"test/nll": 1.0}, measured={"evaluation": evaluation(0.7)})
    selection = select(tmp_path)
    assert selection.metric(selection.entries[0], "test/accuracy").problem == "missing"


def test_of_two_results_under_one_card_the_newest_counts(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit")
    add_result(run, "end-aaaaaaaa", spectrum(0.4), time=2000.0)
    add_result(run, "end-bbbbbbbb", spectrum(0.3), time=1000.0)
    selection = select(tmp_path)
    assert selection.scalar(selection.entries[0], SPECTRUM, NEP).number == 0.4


def test_conditions_of_most_runs_come_before_newer_ones_and_before_more_results(
    make_run: Callable, tmp_path: Path
) -> None:
    many, few = other_card(n_images=64), other_card(n_images=32)
    for seed in (0, 1):
        add_result(make_run("vit", seed), "end-aaaaaaaa", spectrum(0.1, card=few), time=1000.0)
    run = make_run("vit", 2)
    for i, time in enumerate((2000.0, 2001.0, 2002.0)):  # one run, measured three times
        add_result(run, f"end-{i}aaaaaaa", spectrum(0.3, card=many), time=time)
    selection = select(tmp_path)
    assert [selection.scalar(e, SPECTRUM, NEP).number for e in selection.entries] == [0.1, 0.1, None]


def test_of_conditions_of_equally_many_runs_the_newest_count(make_run: Callable, tmp_path: Path) -> None:
    """Newest is the last result of either, not the first."""
    one, other = other_card(n_images=32), other_card(n_images=64)
    first, second = make_run("vit", 0), make_run("vit", 1)
    add_result(first, "end-aaaaaaaa", spectrum(0.1, card=one), time=1000.0)
    add_result(second, "end-aaaaaaaa", spectrum(0.3, card=other), time=2000.0)
    add_result(first, "end-bbbbbbbb", spectrum(0.2, card=one), time=3000.0)
    selection = select(tmp_path)
    assert [selection.scalar(e, SPECTRUM, NEP).number for e in selection.entries] == [0.2, None]


def test_a_run_without_results_at_the_end_shows_its_newest_good_ones(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit")
    for i, (time, nep) in enumerate(((3000.0, 0.3), (5000.0, 0.5), (4000.0, 0.4))):
        add_result(run, f"epoch-000{i}-aaaaaaaa", spectrum(nep), time=time)
    selection = select(tmp_path, or_newest=True)
    (entry,) = selection.entries
    assert selection.scalar(entry, SPECTRUM, NEP).number == 0.5
    record = run.results / "hessian" / "epoch-0003-aaaaaaaa.json"
    record.write_text(f'{{"measure": "{SPECTRUM}", "error": "boom", "scalars": null}}')
    os.utime(record, (9000.0, 9000.0))
    selection = select(tmp_path, or_newest=True)
    assert selection.scalar(selection.entries[0], SPECTRUM, NEP).number == 0.5


def test_no_positive_eigenvalue_counts_those_near_zero(make_run: Callable, tmp_path: Path) -> None:
    nan = float("nan")
    none_positive = dataclasses.replace(spectrum(0.75, nan), near_zero_proportion=0.25)
    make_run("vit", measured={"hessian": none_positive})
    selection = select(tmp_path)
    value = selection.scalar(selection.entries[0], SPECTRUM, "average_positive_eigenvalue")
    assert (value.number, value.problem, value.why) == (None, "", "none positive")


def test_moments_are_in_the_order_of_training() -> None:
    tags = ["end", "epoch-0010", "step-1000000", "step-000120", "init", "epoch-0002", "step-000120-ema"]
    assert sorted(tags, key=moment) == [
        "init", "step-000120", "step-000120-ema", "step-1000000", "epoch-0002", "epoch-0010", "end",
    ]  # fmt: skip


def test_results_of_another_analysis_of_one_measure_do_not_hide_each_other(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", measured={"sharpness": rise(0.5), "sharpness_clean": rise(0.1, card=other_card(n_images=64))})
    selection = select(tmp_path)
    (entry,) = selection.entries
    found = [selection.of_analysis(entry, name)[0] for name in ("sharpness", "sharpness_clean")]
    assert [m.scalars["rise_r0.1"] for m in found if m is not None] == [0.5, 0.1]
