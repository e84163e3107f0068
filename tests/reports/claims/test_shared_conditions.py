"""Statistics of claims compare only numbers that were measured under the same conditions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.claim_effects import ape
from tests.fixtures.runs.report_runs import bench, curve, other_card, rise, spectrum
from vitscope.reports.claims import claim_statistics, claim_verdicts
from vitscope.reports.claims.claims import CLAIMS

SEEDS = range(5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"options": {"solver": "power"}}, "options.solver 'power'"),
        ({"options": {"operator": "ggn"}}, "options.operator 'ggn'"),
        ({"options": {"n_top": 9}}, "options.n_top 9"),
        ({"n_images": 64}, "n_images 64"),
        ({"preprocessing": "squash crop"}, "preprocessing 'squash crop'"),
    ],
)
def test_spectra_of_other_conditions_are_never_set_against_each_other(
    make_run: Callable, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    options = {"solver": "lanczos", "operator": "hessian", "n_top": 5}
    card = other_card(options=options)
    other = other_card(**{**changes, "options": {**options, **changes.get("options", {})}})
    for seed in SEEDS:
        make_run("convnet", seed, measured={"hessian": spectrum(ape=200.0, card=other)})
        make_run("alternet", seed, measured={"hessian": spectrum(ape=100.0 + seed, card=card)})
    (claim,) = [c for c in CLAIMS if c.name == "msa_flattens"]
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    finding = judged.findings[0]
    assert finding.verdict == claim_verdicts.NOT_MEASURED
    assert f"measured otherwise: {key}, most runs" in finding.reason
    assert "(5 left out)" in finding.reason
    asked = bench(tmp_path)
    asked.selection.allow_different = True  # figures may overlay them; a verdict is not a matter of asking
    (judged,) = claim_verdicts.judge(asked, [claim])
    assert judged.findings[0].verdict == claim_verdicts.NOT_MEASURED


def test_spectra_whose_options_are_not_recorded_are_set_against_nothing(make_run: Callable, tmp_path: Path) -> None:
    old = other_card(options=None)  # one may be of the Gauss-Newton matrix and five values, one of the Hessian and one
    for seed in SEEDS:
        make_run("convnet", seed, measured={"hessian": spectrum(ape=200.0, card=old)})
        make_run("alternet", seed, measured={"hessian": spectrum(ape=100.0 + seed, card=old)})
    (claim,) = [c for c in CLAIMS if c.name == "msa_flattens"]
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    assert judged.findings[0].verdict == claim_verdicts.NOT_MEASURED
    assert "conditions that were not recorded: measure again (10 left out)" in judged.findings[0].reason


def test_runs_that_no_trend_takes_do_not_decide_its_conditions(make_run: Callable, tmp_path: Path) -> None:
    """ViTs on fractions of the data, in the majority, are measured on fewer images than the models of the trend over bias."""
    for model, nep in (("vit", 0.4), ("pit", 0.3), ("swin", 0.2), ("convnet", 0.1)):
        make_run(model, measured={"hessian": spectrum(nep, card=other_card(n_images=64))})
    for fraction in (0.02, 0.06, 0.1, 0.2, 0.6):
        card = other_card(data=f"photos, {fraction:g}", n_images=32)
        make_run("vit", data__fraction=fraction, measured={"hessian": spectrum(0.3, card=card)})
    (claim,) = [c for c in CLAIMS if c.name == "weak_bias_negatives"]
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    assert judged.findings[0].effect.values == pytest.approx({0: -0.1}, rel=1e-9)


def test_training_losses_of_two_measures_are_not_matched(make_run: Callable, tmp_path: Path) -> None:
    made = {"hessian@epoch-0000": spectrum(ape=10.0), "hessian": spectrum(ape=20.0)}
    sharp = {"sharpness@epoch-0000": rise(0.1, nll=1.0), "sharpness": rise(0.1, nll=0.5)}
    sliced = {"slice": curve()}  # 0.5 at its center, as the other ends
    make_run("alternet", measured=made | sharp)
    make_run("convnet", measured=made | sliced)
    assert ape(matched="nll")(bench(tmp_path)).values == {}
    make_run("convnet", 1, measured=made | sliced)
    make_run("alternet", 1, measured=made | sharp | sliced)
    assert ape(matched="nll")(bench(tmp_path)).values == pytest.approx({1: 0.0})


def test_a_trend_of_training_losses_is_of_one_measure(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (0.01, 0.1, 1.0):
        card = other_card(data=f"photos, {fraction:g}")
        measured = {"slice": curve(card)} if fraction < 1 else {"sharpness": rise(0.1, nll=9.0, card=card)}
        make_run("vit", data__fraction=fraction, measured=measured)
    b = bench(tmp_path)
    found = claim_statistics.data_trend(b, claim_statistics.training_nll(b), -1, fixed="epochs", requirement="slice")
    assert found.values == {}


def test_runs_of_another_comparison_do_not_decide_under_which_conditions_this_one_is_made(
    make_run: Callable, tmp_path: Path
) -> None:
    many = other_card(n_images=64)
    for seed in range(9):  # the majority of all runs
        make_run("pit", seed, measured={"hessian": spectrum(card=many)})
    for seed in SEEDS:
        make_run("alternet", seed, measured={"hessian": spectrum(ape=100.0 + seed)})
        make_run("convnet", seed, measured={"hessian": spectrum(ape=200.0)})
    (claim,) = [c for c in CLAIMS if c.name == "msa_flattens"]
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    assert len(judged.findings[0].effect.values) == 5
    assert judged.findings[0].effect.refused == ""


def test_results_without_recorded_conditions_do_not_decide_those_of_the_others(
    make_run: Callable, tmp_path: Path
) -> None:
    for seed in range(9):
        card = other_card(options={} if seed < 3 else None)  # six of nine are of an older version
        make_run("alternet", seed, measured={"hessian": spectrum(ape=100.0 + seed, card=card)})
        make_run("convnet", seed, measured={"hessian": spectrum(ape=200.0, card=card)})
    (claim,) = [c for c in CLAIMS if c.name == "msa_flattens"]
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    assert set(judged.findings[0].effect.values) == {0, 1, 2}


def test_a_report_of_the_newest_results_judges_those(make_run: Callable, tmp_path: Path) -> None:
    for seed in SEEDS:
        make_run("alternet", seed, measured={"hessian@epoch-0001": spectrum(ape=100.0 + seed)})
        make_run("convnet", seed, measured={"hessian@epoch-0001": spectrum(ape=200.0)})
    (claim,) = [c for c in CLAIMS if c.name == "msa_flattens"]
    newest = bench(tmp_path)
    newest.selection.or_newest = True
    (judged,) = claim_verdicts.judge(newest, [claim])
    assert set(judged.findings[0].effect.values) == set(SEEDS)
    (judged,) = claim_verdicts.judge(bench(tmp_path), [claim])
    assert judged.findings[0].verdict == claim_verdicts.NOT_MEASURED
