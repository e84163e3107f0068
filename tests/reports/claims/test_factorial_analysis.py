"""The 2x2x2 on runs whose numbers are sums of known factors: effects, shares, flips and intervals come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.fixtures.runs.factorial_runs import PAIRS, WD, write
from tests.fixtures.runs.report_runs import CARD, other_card
from vitscope.reports import run_index
from vitscope.reports.claims import factorial_analysis
from vitscope.reports.figures import factorial_figure
from vitscope.reports.tables import factorial_tables
from vitscope.reports.value_lookup import Selection
from vitscope.runs import run_search
from vitscope.stats.t_tests import Interval


def answer(tmp_path: Path) -> factorial_analysis.FactorialResult:
    found = factorial_analysis.analyze_factors(Selection(run_index.collect(run_search.every(tmp_path / "runs"))))
    assert found is not None
    return found


def effects(found: factorial_analysis.FactorialResult, quantity: str, l2: str) -> dict[str, factorial_analysis.Effect]:
    return {e.factor: e for e in found.effects if (e.quantity, e.l2) == (quantity, l2)}


def test_effects_are_the_factors_that_made_the_numbers(make_run: Callable, tmp_path: Path) -> None:
    write(make_run)
    found = answer(tmp_path)
    assert found.problems == ()
    by = effects(found, "rise", "half_sq")
    # differences: 1, 0, -2, -3 for the NLL over (weak, strong) x (clean, augmented), -0.01 with the L2 term
    assert [by[f].difference.mean for f in factorial_analysis.FACTORS] == pytest.approx([-3.0, -1.0, -0.01], abs=1e-12)
    assert by["training"].vit.mean == pytest.approx(-3)
    assert by["training"].convnet.mean == pytest.approx(0, abs=1e-12)
    assert by["objective"].convnet.mean == pytest.approx(0.02)
    shares = [by[f].share for f in factorial_analysis.FACTORS]
    assert shares == pytest.approx(np.array([9, 1, 1e-4]) / 10.0001)  # additive: no interaction
    # the switch of the training turns +1 into -2 and, with the L2 term, +.99 into -2.01; 0 has no sign to flip
    assert by["training"].flips == 2
    assert by["images"].flips == 1  # .99 to -.01
    assert found.lower("rise", "half_sq") == 5


def test_the_l2_terms_have_their_own_say(make_run: Callable, tmp_path: Path) -> None:
    write(make_run)
    found = answer(tmp_path)
    assert effects(found, "rise", "sum_norm")["objective"].difference.mean == pytest.approx(-10)
    assert effects(found, "rise", "sum_norm")["objective"].share > 0.9
    # half_sq moves every eigenvalue by wd: no difference between models
    by = effects(found, "ape", "half_sq")
    assert by["objective"].vit.mean == pytest.approx(WD, rel=1e-9)
    assert by["objective"].difference.mean == pytest.approx(0, abs=1e-9)
    assert not effects(found, "ape", "sum_norm")
    key = ("border", ("weak", "clean", "half_sq"), "convnet")
    assert found.values[key].mean == pytest.approx(5 + 2)
    assert np.isnan(found.values[key].half_width)  # one plane has no interval


def test_the_run_s_own_l2_is_taken_off_the_spectrum_first(make_run: Callable, tmp_path: Path) -> None:
    def shifted(measured: dict[str, Any], *_: str) -> dict[str, Any]:
        own = np.full((2, 2), WD)
        return {
            name: dataclasses.replace(r, eigenvalues=r.eigenvalues + WD, l2_contribution=own)
            if name.startswith("hessian")
            else r
            for name, r in measured.items()
        }

    write(make_run, change=shifted)
    values = answer(tmp_path).values
    # the positive values of convnets: 500, 500 and 1
    assert values["ape", ("weak", "clean", "nll"), "convnet"].mean == pytest.approx(1001 / 3)
    assert values["ape", ("weak", "clean", "half_sq"), "convnet"].mean == pytest.approx(1001 / 3 + WD)


def test_eigenvalues_within_their_residual_are_no_part_of_the_average() -> None:
    """The run's own L2 term is taken off, the condition's is added, and then the sign is judged by the residual."""
    result = SimpleNamespace(
        eigenvalues=np.array([[5.0, 0.5, -2.0], [3.0, 0.9, -1.0], [100.0, 100.0, 100.0]]),
        residuals=np.full((3, 3), 0.6),
        l2_contribution=np.full((3, 3), 0.25),
        card=SimpleNamespace(weight_decay=0.4),
    )
    (ape,) = (q for q in factorial_analysis.QUANTITIES if q.key == "ape")
    parts = np.array([0, 1])  # the third mini-batch is left out
    assert ape.value(result, "nll", parts) == pytest.approx(np.mean([4.75, 2.75, 0.65]))
    assert ape.value(result, "half_sq", parts) == pytest.approx(np.mean([5.15, 0.65, 3.15, 1.05]))
    assert ape.undefined(result) == ""
    result.eigenvalues = np.full((3, 3), 0.6)
    assert ape.undefined(result) == "none positive"


def test_one_seed_has_the_interval_over_pairs_and_what_pairs_share_cancels(make_run: Callable, tmp_path: Path) -> None:
    write(make_run)
    found = answer(tmp_path)
    single = found.values["rise", ("weak", "clean", "nll"), "vit"]
    low, high = stats.t.interval(0.95, 2, 6 + PAIRS.mean(), stats.sem(PAIRS))
    assert (single.low, single.high) == pytest.approx((low, high))
    # the same directions for both models: their differences do not vary at all
    difference = found.values["rise", ("weak", "clean", "nll"), "difference"]
    assert difference.mean == pytest.approx(1)
    assert np.isnan([difference.half_width, difference.p]).all()  # nothing to judge by, and no interval without width


def test_tables_of_two_seeds_print_means_and_no_interval(make_run: Callable, tmp_path: Path) -> None:
    write(make_run, seeds=2, shift=0.5)
    found = answer(tmp_path)
    assert found.values["rise", ("weak", "clean", "nll"), "difference"].half_width > 0
    conditions, factors = factorial_tables.tables(found)
    assert not any("±" in cell.text or "[" in cell.text for row in (*conditions.rows, *factors.rows) for cell in row)
    assert "Means of 2 seeds, differences paired by seed; no interval is printed below 3 seeds." in conditions.note


def test_several_seeds_have_the_paired_interval_over_seeds(make_run: Callable, tmp_path: Path) -> None:
    write(make_run, seeds=3, shift=0.5)
    found = answer(tmp_path)
    assert found.seeds == (0, 1, 2)
    difference = found.values["rise", ("weak", "clean", "nll"), "difference"]
    low, high = stats.t.interval(0.95, 2, 1.5, stats.sem([1.0, 1.5, 2.0]))
    assert (difference.low, difference.high) == pytest.approx((low, high))
    equal = effects(found, "rise", "half_sq")["training"].difference  # in every seed, up to rounding
    assert np.isnan([equal.half_width, equal.p]).all()


def test_images_that_follow_the_training_are_refused(make_run: Callable, tmp_path: Path) -> None:
    def otherwise(measured: dict[str, Any], _: str, training: str) -> dict[str, Any]:
        card = other_card(augmentation="mixup") if training == "strong" else CARD
        return measured | {"sharpness": dataclasses.replace(measured["sharpness"], card=card)}

    write(make_run, change=otherwise)
    found = answer(tmp_path)
    assert [str(p) for p in found.problems] == [
        "missing: landscape_objective: sharpness (objective cards differ in augmentation: the factors are not crossed)"
    ]
    assert {e.quantity for e in found.effects} == {"ape", "border"}


def test_what_is_saturated_is_said_and_what_is_missing_named(make_run: Callable, tmp_path: Path) -> None:
    def broken(measured: dict[str, Any], model: str, training: str) -> dict[str, Any]:
        if (model, training) == ("vit", "weak"):
            del measured["hessian"]
            measured["sharpness"] = dataclasses.replace(measured["sharpness"], saturated=np.array([True]))
        return measured

    write(make_run, change=broken)
    found = answer(tmp_path)
    said = [str(p) for p in found.problems]
    assert not any("sharpness" in s or "rise" in s for s in said)  # by its definition: nothing is wrong
    assert [c[:2] for q, c in found.undefined if q == "rise"] == [("weak", "augmented")] * 3  # three objectives
    assert sum("hessian (not measured at end)" in s for s in said) == 1
    tables = {t.name: t for t in factorial_tables.tables(found)}
    assert any(cell.problem == "missing" for row in tables["conditions"].rows for cell in row)
    assert any(cell.text == "saturated" and not cell.problem for row in tables["factors"].rows for cell in row)
    assert not any(cell.problem == "failed" for table in tables.values() for row in table.rows for cell in row)
    factorial_figure.draw(found).draw_without_rendering()


def test_without_the_four_trainings_there_is_no_answer(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit")
    selection = Selection(run_index.collect(run_search.every(tmp_path / "runs")))
    assert factorial_analysis.analyze_factors(selection) is None
    made = factorial_tables.write_factorial_tables(selection, tmp_path)
    assert not made["factors"].rows
    assert "landscape-objective" in str(made["factors"].problems[0])


def test_tables_and_figure_say_who_and_why(make_run: Callable, tmp_path: Path) -> None:
    write(make_run)
    selection = Selection(run_index.collect(run_search.every(tmp_path / "runs")))
    made = factorial_tables.write_factorial_tables(selection, tmp_path / "figures")
    texts = [[cell.text for cell in row] for row in made["conditions"].rows]
    assert len(texts) == 12
    assert texts[0][:5] == ["weak, clean, NLL", "5.00 ± 0.66", "6.00 ± 0.66", "1", "ConvNet ?"]
    assert len(made["factors"].rows) == 3 * (2 + 1 + 2)
    note = made["factors"].note
    assert (
        "rise at r = 0.1 (nats), NLL + ½ wd Σ‖w‖²: ViT looks flatter in 5 of 8 conditions; training makes 90%" in note
    )
    assert made["factors"].picture == tmp_path / "figures" / "factors.png"
    assert made["factors"].picture.stat().st_size > 10_000


def test_a_model_at_no_minimum_is_not_called_flat() -> None:
    falling, rising, difference = (Interval(mean, 0.05, 0.0, 5) for mean in (-0.13, 0.4, 0.53))
    assert factorial_tables._flatter(falling, rising, difference) == "no minimum: ConvNet"
    assert factorial_tables._flatter(rising, falling, difference) == "no minimum: ViT"
    assert factorial_tables._flatter(rising, rising, difference) == "ConvNet"
    uncertain = Interval(-0.02, 0.05, 0.4, 5)
    assert factorial_tables._flatter(uncertain, rising, difference) == "no minimum: ConvNet"


@pytest.mark.parametrize(
    ("shares", "conclusion"),
    [
        ((0.5, 0.3, 0.1), "training makes 50% of how the difference varies"),
        ((0.2, 0.6, 0.1), "images makes 60% of how the difference varies"),
        ((0.3, 0.2, 0.1), "no factor alone: interactions make 40% of how the difference varies"),
    ],
)
def test_the_sentence_names_the_largest_share(shares: tuple[float, ...], conclusion: str) -> None:
    nothing = Interval(0.0, 0.1, 0.5, 3)
    effects = tuple(
        factorial_analysis.Effect("rise", "half_sq", factor, nothing, nothing, nothing, share, 0)
        for factor, share in zip(factorial_analysis.FACTORS, shares)
    )
    lower = factorial_analysis.conditions("half_sq")[:3]
    values = {
        ("rise", c, "difference"): Interval(-1.0 if c in lower else 1.0, 0.1, 0.0, 3)
        for c in factorial_analysis.CONDITIONS
    }
    result = factorial_analysis.FactorialResult({}, (0, 1, 2), values, effects, (), {})
    sentence = factorial_tables.verdict_sentence(result, "rise", "half_sq")
    assert sentence.endswith(f": ViT looks flatter in 3 of 8 conditions; {conclusion}.")
