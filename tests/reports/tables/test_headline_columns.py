"""Each column of the headline tables has the number that its heading says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.runs.claim_effects import write_scalars
from tests.fixtures.runs.report_runs import bench, evaluation
from vitscope.reports.model_costs import Costs
from vitscope.reports.tables import headline_tables

METRICS = {"test/accuracy": 0.91, "test/nll": 0.92, "test/ece": 0.93, "test/brier": 0.94}
SCALARS = {
    "hessian_max_eigenvalue_spectrum": {
        "negative_eigenvalue_proportion": 0.01, "average_positive_eigenvalue": 2.0, "top1_negative_eigenvalue_proportion": 0.03,
        "top1_average_positive_eigenvalue": 4.0, "eigenvalue_max": 5.0, "eigenvalue_min": -6.0,
    },
    "hessian_eigenvalues": {"eigenvalue_max": 7.0, "eigenvalue_min": -8.0},
    "hessian_trace": {"trace": 9.0},
    "sharpness": {"rise_r0.1": 10.0, "worst_rise_r0.1": 11.0},
    "corruption": {"mean_accuracy": 0.12, "mce": 13.0},
    "frequency_noise_robustness": {"high_minus_low": 0.14},
    "adversarial": {"fgsm_8_accuracy": 0.15, "pgd_8_accuracy": 0.16},
    "calibration": {"scaled_ece": 0.17},
    "shape_bias": {"shape_bias": 0.18},
}  # fmt: skip
TEST = {"accuracy": "0.910", "NLL": "0.920", "ECE": "0.930"}
SPECTRUM = {"NEP": "0.010", "APE": "2"}
COST = {"parameters": "5.00M", "FLOPs": "1.00G"}
ROBUST = {"robust accuracy": "0.120"}
EXPECTED = {
    "models": {**COST, **TEST, **ROBUST, **SPECTRUM},
    "curvature": {
        **SPECTRUM, "NEP, k=1": "0.030", "APE, k=1": "4", "max λ": "5", "min λ": "-6", "max λ, all images": "7",
        "min λ, all images": "-8", "trace": "9", "rise at r=.1": "10", "worst rise at r=.1": "11",
    },
    "robustness": {
        **TEST, "Brier": "0.940", **ROBUST, "mCE (%)": "13.0", "band noise, high − low": "0.140", "FGSM 8/255": "0.150",
        "PGD 8/255": "0.160", "ECE, T scaled": "0.170", "shape bias": "0.180",
    },
    "buildup": {**COST, **TEST, **SPECTRUM, **ROBUST},
}  # fmt: skip


@pytest.mark.parametrize("name", headline_tables.TABLES)
def test_a_heading_stands_above_its_number(make_run: Callable, tmp_path: Path, name: str) -> None:
    run = make_run("alternet", metrics=METRICS)
    for measure, scalars in SCALARS.items():
        write_scalars(run, measure, scalars)
    table = headline_tables.build(name, bench(tmp_path).selection, Costs())
    cells = {title: cell.text for title, cell in zip(table.columns, table.rows[0]) if title not in ("model", "MSAs")}
    assert cells == EXPECTED[name]


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_the_note_names_the_images_of_evaluations_that_stand_in_for_a_test(
    make_run: Callable, tmp_path: Path, command: str
) -> None:
    make_run("vit", facts={"command": command}, metrics={}, measured={"evaluation": evaluation(0.7)}, ckpt_path="a.pth")
    table = headline_tables.build("models", bench(tmp_path).selection, Costs())
    sentence = "accuracy and NLL of models that were not trained here: evaluation on 32 test images"
    assert (sentence in table.note) == (command == "analyze")
    (accuracy,) = (cell.text for title, cell in zip(table.columns, table.rows[0]) if title == "accuracy")
    assert accuracy == ("0.700" if command == "analyze" else "missing")
