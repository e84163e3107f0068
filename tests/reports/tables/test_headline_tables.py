from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.fixtures.runs.report_runs import CARD, other_card, rise, spectrum
from vitscope.core.objective_card import ObjectiveCard
from vitscope.diagnostics.corruption.corruption import CorruptionResult
from vitscope.reports import run_index
from vitscope.reports.model_costs import Cost, Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables import headline_notes, headline_tables
from vitscope.reports.tables import table as cells
from vitscope.reports.value_lookup import Selection, Value
from vitscope.runs import run_search
from vitscope.stats.t_tests import Interval, t_interval


def corruption(accuracy: float, card: ObjectiveCard) -> CorruptionResult:
    """Return an accuracy under noise and blur at severity 1."""
    table = np.full((2, 1), accuracy)
    nothing = np.zeros(0)
    return CorruptionResult(
        types=("gaussian_noise", "motion_blur"), severities=np.array([1]), accuracy=table, nll=table, ece=table,
        clean_accuracy=0.5, clean_nll=1.0, clean_ece=0.1, mean_accuracy=accuracy, mean_accuracy_standard_error=0.01,
        baseline="", ce=nothing, relative_ce=nothing, mce=None, relative_mce=None, source="generated",
        n_images=card.n_images, card=card,
    )  # fmt: skip


class Given(Costs):
    """Costs that are known beforehand."""

    def of(self, entry: Entry) -> Cost:
        if entry.family == "pit":
            return Cost(None, None, "cannot be built")
        return Cost(5_403_172, 3_338_451_456)


def build(root: Path, name: str = "models", **options: object) -> cells.Table:
    selection = Selection(run_index.collect(run_search.every(root / "runs")))
    return headline_tables.build(name, selection, Given(), **options)


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        ({}, "all test images"),
        ({"limit_test_batches": 1.0}, "all test images"),
        ({"limit_test_batches": 0.1}, "a share of 0.1 of the test images"),
        ({"limit_test_batches": 5, "devices": 1}, "at most 320 test images"),
        ({"limit_test_batches": 5, "devices": 4}, "at most 5 batches of test images per process"),
    ],
)
def test_the_test_images_of_a_run_are_said(trainer: dict[str, object], text: str) -> None:
    entry = SimpleNamespace(config={"trainer": trainer, "data": {"eval_batch_size": 64}})
    assert headline_notes._tested_text(entry) == text


def test_cells_with_fewer_seeds_than_their_rows_are_said() -> None:
    assert cells.seeds_text([3, 3]).endswith("where they differ")
    assert cells.seeds_text([3, 3], has_few=True).endswith("fewer than 3 seeds: their values, no interval")


def test_rows_have_the_given_names_in_the_given_order(make_run: Callable, tmp_path: Path) -> None:
    metrics = {"test/accuracy": 0.5, "test/nll": 1.5, "test/ece": 0.05}
    run = make_run("vit", 0, metrics=metrics)
    make_run("pit", 0, metrics=metrics)
    table = build(tmp_path, labels={run.id: "ViT-Ti/4", "pit-tiny": "PiT-Ti"}, order=["ViT-Ti/4"])
    assert [row[0].text for row in table.rows] == ["ViT-Ti/4", "PiT-Ti"]
    assert [row["model"] for row in table.runs] == ["ViT-Ti/4", "PiT-Ti"]


def test_means_and_intervals_over_seeds(make_run: Callable, tmp_path: Path) -> None:
    accuracies = [0.5, 0.52, 0.57]
    for seed, accuracy in enumerate(accuracies):
        metrics = {"test/accuracy": accuracy, "test/nll": 1.5, "test/ece": 0.05}
        make_run("vit", seed, metrics=metrics, measured={"hessian": spectrum(0.25, 100.0 + seed)})
    table = build(tmp_path)
    (row,) = table.rows
    by_id = dict(zip(table.ids, row))
    assert not table.problems
    assert [cell.text for cell in row[:3]] == ["vit-tiny", "5.40M", "3.34G"]
    runs = pd.read_csv(next(path for path in cells.write(table, tmp_path) if path.name == "models-runs.csv"))
    assert runs["test/accuracy"].tolist() == accuracies
    assert runs["seed"].tolist() == [0, 1, 2]
    assert set(runs["run"]) == {run.id for run in run_search.every(tmp_path / "runs")}
    expected = t_interval(accuracies)
    assert by_id["test/accuracy"].text == f"{expected.mean:.3f} ± {expected.half_width:.3f}" == "0.530 ± 0.090"
    assert by_id["test/nll"].text == "1.500"  # no width, no ±
    assert by_id["hessian_max_eigenvalue_spectrum/negative_eigenvalue_proportion"].text == "0.250"
    assert (
        by_id["hessian_max_eigenvalue_spectrum/average_positive_eigenvalue"].text == "101.0 ± 2.5"
    )  # 4.303 x 1 / 3**.5


def test_what_is_missing_is_named_and_never_filled(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, measured={"hessian": spectrum(0.25)})
    make_run("vit", 1)
    make_run("convnet", 0, measured={"hessian": "ValueError: boom"})
    make_run("pit", 0, metrics={"test/accuracy": 0.5, "test/nll": float("nan")}, measured={"hessian": spectrum(0.1)})
    table = build(tmp_path, expect_models=["vit", "alternet"], expect_seeds=[0, 1])
    rows = {row[0].text: dict(zip(table.ids, row)) for row in table.rows}
    nep = "hessian_max_eigenvalue_spectrum/negative_eigenvalue_proportion"
    assert rows["vit-tiny"][nep].text == "0.250 (1 of 2)"
    assert rows["convnet-18"][nep].text == "failed"
    assert rows["pit-tiny"]["test/nll"].text == "failed"
    assert rows["pit-tiny"]["test/ece"].text == "missing"
    assert rows["pit-tiny"]["parameters"].text == "failed"
    assert {rows["alternet"][key].text for key in table.ids[1:]} == {"missing"}
    lines = {str(p) for p in table.problems}
    pit, vit = (next(e.id for e in run_index.collect(run_search.every(tmp_path / "runs")) if e.family == f and e.seed == s)
                for f, s in (("pit", 0), ("vit", 1)))  # fmt: skip
    assert f"missing: run {vit}: {nep} (not measured at end)" in lines
    assert f"failed: run {pit}: test/nll (not finite)" in lines
    assert f"failed: run {pit}: parameters (cannot be built)" in lines
    assert "missing: convnet-18, seed 1: test/accuracy (no run)" in lines
    assert f"missing: alternet: {nep} (no run of this model)" in lines


def test_a_rise_that_is_saturated_is_no_missing_cell(make_run: Callable, tmp_path: Path) -> None:
    card = other_card(solver={"radii": [0.1]})
    broken = dataclasses.replace(rise(9.0, card=card), saturated=np.array([True]), worst_rise=np.array([np.nan]))
    make_run("vit", 0, measured={"hessian": spectrum(), "sharpness": broken})
    make_run("convnet", 0, measured={"hessian": spectrum(), "sharpness": broken})
    make_run("convnet", 1, measured={"hessian": spectrum(), "sharpness": rise(0.5, card=card)})
    table = build(tmp_path, "curvature")
    assert table.problems == ()
    at = table.ids.index("sharpness/rise_r0.1")
    assert {row[0].text: row[at].text for row in table.rows} == {"vit-tiny": "saturated", "convnet-18": "0.5 (1 of 2)"}


def test_a_mean_of_no_positive_eigenvalue_is_no_failed_cell(make_run: Callable, tmp_path: Path) -> None:
    nan = float("nan")
    make_run(
        "vit", 0, measured={"hessian": dataclasses.replace(spectrum(1.0, nan), top1_average_positive_eigenvalue=nan)}
    )
    make_run("convnet", 0, measured={"hessian": spectrum(0.5, nan)})  # half of the values are positive: a failure
    table = build(tmp_path)
    assert [str(p) for p in table.problems] == [
        f"failed: run {run_index.collect(run_search.every(tmp_path / 'runs'))[0].id}: "
        "hessian_max_eigenvalue_spectrum/average_positive_eigenvalue (not finite)"
    ]
    assert {row[0].text: row[-1].text for row in table.rows} == {"vit-tiny": "none positive", "convnet-18": "failed"}


def test_columns_that_nobody_measured_are_left_out_and_data_sets_told_apart(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", measured={"hessian": spectrum(), "sharpness": rise(0.123)})
    make_run("vit", data__fraction=0.5, measured={"hessian": spectrum(card=other_card(data="photos, 0.5"))})
    table = build(tmp_path, "curvature")
    assert "rise at r=.1" in table.columns
    assert "trace" not in table.columns
    assert [row[1].text for row in table.rows] == ["photos", "photos (0.5)"]
    texts = [dict(zip(table.ids, row))["sharpness/rise_r0.1"].text for row in table.rows]
    assert texts == ["0.123", "missing"]


def test_the_build_up_is_ordered_by_its_attention(make_run: Callable, tmp_path: Path) -> None:
    for n_msa in ([0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]):
        make_run("alternet", model__n_msa=n_msa, measured={"hessian": spectrum()})
    make_run("alternet", measured={"hessian": spectrum()}, optimizer__lr=0.1)  # the default counts
    make_run("vit")
    table = build(tmp_path, "buildup")
    assert [row[1].text for row in table.rows] == ["0,0,0,1", "0,0,1,1", "0,1,1,1", "0,1,1,1"]


def test_analyses_of_untrained_models_are_no_rows(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", facts={"command": "analyze"}, metrics={}, measured={"hessian": spectrum()})
    table = build(tmp_path)
    assert table.rows == ()
    assert table.note.startswith("No run that was trained here, or evaluated on the whole test split")


def test_files_hold_the_numbers(tmp_path: Path) -> None:
    values = {f"run {i}": Value(float(v)) for i, v in enumerate((1.0, 2.0, 4.0))}
    cell, problems = cells.over_seeds({**values, "run 3": Value(None, "missing", "gone")}, "m_x", ".2f", 4)
    assert [str(p) for p in problems] == ["missing: run 3: m_x (gone)"]
    name = cells.Cell("a_b | 50%")
    table = cells.Table("t", "Title", ("model", "λ & x"), ("model", "m_x"), ((name, cell),), "Note.")
    paths = {path.suffix: path for path in cells.write(table, tmp_path)}
    assert "| a_b \\| 50% | 2.33 ± 3.79 (3 of 4) |" in paths[".md"].read_text()
    frame = pd.read_csv(paths[".csv"])
    assert list(frame.columns) == ["model", "m_x", "m_x_half_width", "m_x_n"]
    sample = np.array([1.0, 2.0, 4.0])
    assert frame["m_x"][0] == pytest.approx(sample.mean(), rel=1e-15)
    assert frame["m_x_n"][0] == 3
    tex = paths[".tex"].read_text()
    assert r"a\_b | 50\% & 2.33 $\pm$ 3.79 (3 of 4) \\" in tex
    assert r"model & $\lambda$ \& x \\" in tex


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (999, "si", "999"),
        (1234, "si", "1.23k"),
        (9_499_063, "si", "9.50M"),
        (3.34e12, "si", "3.34T"),
        (999_994, "si", "999.99k"),
        (999_996, "si", "1.00M"),
        (0.5, ".3f", "0.500"),
        (-0.0004, ".3f", "0.000"),
        (-0.0006, ".3f", "-0.001"),
        (-0.0, ".4g", "0"),
    ],
)
def test_numbers(value: float, style: str, text: str) -> None:
    assert cells.number_text(value, style) == text


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.81, 0.02, "0.810 ± 0.020"),
        (0.81, 0.0004, "0.8100 ± 0.0004"),
        (-0.0001, 0.2, "0.000 ± 0.200"),
        (0.5, 0.0, "0.500"),
    ],
)
def test_a_half_width_is_never_printed_as_none(mean: float, half_width: float, text: str) -> None:
    assert cells.interval_text(Interval(mean, half_width, 0.5, 3), ".3f") == text


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [(101.0, 2.484, "101.0 ± 2.5"), (0.052, 2.484, "0.052 ± 2.484"), (0.0, 2.484, "0.0 ± 2.5"), (1234.0, 567.0, "1234 ± 567")],
)  # fmt: skip
def test_the_smaller_of_mean_and_half_width_has_two_digits(mean: float, half_width: float, text: str) -> None:
    assert cells.interval_text(Interval(mean, half_width, 0.5, 3), ".4g") == text


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_equal_seeds_have_a_mean_and_no_half_width(noise: float) -> None:
    values = {f"run {i}": Value(0.25 + i * noise) for i in range(3)}
    cell, _ = cells.over_seeds(values, "m_x", ".2f", 3)
    assert cell.text == "0.25"
    table = cells.Table("t", "Title", ("model", "x"), ("model", "m_x"), ((cells.Cell("a"), cell),))
    frame = cells.frame(table)
    assert list(frame.columns) == ["model", "m_x", "m_x_n"]
    assert frame["m_x_n"][0] == 3


@pytest.mark.parametrize(
    ("numbers", "text", "columns"),
    [
        ((0.5,), "0.500", ["m", "m_n"]),
        ((0.5, 0.75), "0.500, 0.750", ["m", "m_values", "m_n"]),
        ((0.5, 0.5), "0.500", ["m", "m_values", "m_n"]),
        ((0.5, 0.6, 0.7), "0.600 ± 0.248", ["m", "m_half_width", "m_n"]),
    ],
)
def test_fewer_than_three_seeds_print_values_and_no_interval(
    numbers: tuple[float, ...], text: str, columns: list[str]
) -> None:
    cell, problems = cells.over_seeds({f"run {i}": Value(v) for i, v in enumerate(numbers)}, "m", ".3f", len(numbers))
    assert (cell.text, problems) == (text, [])
    frame = cells.frame(cells.Table("t", "T", ("m",), ("m",), ((cell,),)))
    assert list(frame.columns) == columns
    assert frame["m"][0] == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)
    assert frame["m_n"][0] == len(numbers)
    if "m_values" in columns:
        assert [float(value) for value in frame["m_values"][0].split()] == list(numbers)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([1, 1], "One seed per row: values without interval"),
        ([2, 2], "2 seeds per row: their values, equal ones once; no interval below 3 seeds"),
        ([1, 2], "1 to 2 seeds per row: their values, equal ones once; no interval below 3 seeds"),
        ([5, 5], "Means over seeds (5 per row), ± half of the 95% t-interval where they differ"),
        ([2, 5], "Means over seeds (2 to 5 per row), ± half of the 95% t-interval where they differ; fewer than 3 seeds: their "
                 "values, no interval"),
    ],
)  # fmt: skip
def test_a_table_says_how_many_seeds_there_were(counts: list[int], text: str) -> None:
    assert cells.seeds_text(counts) == text


def test_the_caption_says_which_images_a_column_of_robustness_used(make_run: Callable, tmp_path: Path) -> None:
    for seed in (0, 1):
        card = dataclasses.replace(CARD, split="test", n_images=16, seed=seed)
        make_run("vit", seed, measured={"corruption": corruption(0.3, card)}, trainer__limit_test_batches=1,
                 data__eval_batch_size=256)  # fmt: skip
    note = build(tmp_path).note
    assert note.startswith("2 seeds per row: their values")
    assert (
        "Robust accuracy (mean over types and severities of corruption): on 16 test images, different ones for each seed if the "
        "split has more. accuracy, NLL, ECE: on at most 256 test images."
    ) in note
    assert "Robust" not in build(tmp_path, "curvature").note


def test_the_caption_says_that_all_runs_used_the_same_images(make_run: Callable, tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, split="test", n_images=10000, seed=7)
    for seed in (0, 1, 2):
        make_run("vit", seed, measured={"corruption": corruption(0.3 + 0.1 * seed, card)})
    table = build(tmp_path, "robustness")
    assert "on 10,000 test images, the same for every run. accuracy, NLL, ECE: on all test images." in table.note
    assert table.note.startswith("Means over seeds (3 per row)")
    published = dataclasses.replace(card, options={"root": "/data/CIFAR-100-C", "n_images": 50000})
    make_run("convnet", measured={"corruption": corruption(0.3, published)})
    selection = Selection([e for e in run_index.collect(run_search.every(tmp_path / "runs")) if e.family == "convnet"])
    note = headline_tables.build("robustness", selection, Given()).note
    assert "on at most 50,000 published images per condition (CIFAR-100-C)." in note


def test_what_another_mixer_replaces_is_no_attention(make_run: Callable, tmp_path: Path) -> None:
    for mixer in ("msa", "conv", "uniform", "blur"):
        make_run("alternet", model__mixer=mixer, model__n_msa=[0, 1, 1, 2])
    table = build(tmp_path, "buildup")
    assert {row[0].text.partition("mixer ")[2]: row[1].text for row in table.rows} == {
        "msa": "0,1,1,2", "conv": "0,0,0,0", "uniform": "0,0,0,0", "blur": "0,0,0,0"
    }  # fmt: skip


def test_latex_has_no_character_that_pdflatex_does_not_know() -> None:
    text = "ViT → PiT, wd Σ‖w‖², ½ ≥ 0.1, 5×5 − 3"
    table = cells.Table("t", "T", ("name", "λ ± Δ"), ("name", "x"), ((cells.Cell(text), cells.Cell("1 ± 2")),))
    latex = cells.latex(table)
    assert latex.isascii()
    assert r"ViT $\rightarrow$ PiT, wd $\Sigma$$\|$w$\|$$^2$, $\frac{1}{2}$ $\geq$ 0.1, 5$\times$5 $-$ 3" in latex


def test_prose_is_at_the_left_and_numbers_are_at_the_right() -> None:
    long = "a reason that is longer than a number with its interval"
    rows = ((cells.Cell("a"), cells.Cell("1"), cells.Cell(long)), (cells.Cell("b"), cells.Cell("10"), cells.Cell("")))
    table = cells.Table("t", "T", ("name", "x", "why"), ("name", "x", "why"), rows)
    rule = cells.markdown(table).splitlines()[3]
    assert [part.strip()[-1] for part in rule.strip("|").split("|")] == ["-", ":", "-"]
    assert f"|   1 | {long} |" in cells.markdown(table)
    assert r"\begin{tabular}{lrl}" in cells.latex(table)
