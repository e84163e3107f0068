"""Which runs and which of their numbers the 2x2x2 takes, and where it gives no interval."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fixtures.runs.factorial_runs import write
from tests.fixtures.runs.report_runs import bench
from vitscope.reports.claims import factorial_analysis, factorial_runs
from vitscope.reports.measured_results import Measured
from vitscope.stats.intervals import LEAST_IMAGES


def test_the_rise_is_that_at_its_radius() -> None:
    (rise,) = (q for q in factorial_analysis.QUANTITIES if q.key == "rise")
    by_pair = np.array([[1.0, 2.0, 6.0], [10.0, 20.0, 60.0], [100.0, 200.0, 600.0]])
    result = SimpleNamespace(
        radii=np.array([0.05, 0.1, 0.5]), saturated=np.array([False, False, True]), rise_by_pair=by_pair,
        l2_half_sq_rise_by_pair=np.full((3, 3), 0.5), l2_sum_norm_rise_by_pair=np.full((3, 3), 3.0),
    )  # fmt: skip
    assert rise.units(result) == 3
    assert rise.value(result, "nll", np.array([0, 2])) == 35.0
    assert rise.value(result, "half_sq", np.array([0, 1, 2])) == 30.5
    assert rise.value(result, "sum_norm", np.array([1])) == 23.0
    assert rise.undefined(result) == ""
    result.saturated = np.array([False, True, True])
    assert np.isnan(rise.value(result, "nll", np.array([0])))
    assert rise.undefined(result) == "saturated"


def test_the_setting_with_the_most_seeds_is_taken(make_run: Callable, tmp_path: Path) -> None:
    for epochs, seeds in ((3, 1), (5, 3), (9, 2)):
        write(functools.partial(make_run, trainer__max_epochs=epochs), seeds=seeds, change=lambda *_: {})
    experiments = factorial_runs.find_experiments(bench(tmp_path).selection)
    assert experiments is not None
    assert {run.config["trainer"]["max_epochs"] for runs in experiments.values() for run in runs.values()} == {5}


def test_of_several_results_the_newest_good_one_is_taken() -> None:
    results = [
        Measured("hessian", tag, "m", Path(name), {}, None, error, time)
        for name, tag, error, time in (
            ("a", "end", "", 1.0), ("b", "end", "", 2.0), ("c", "end", "boom", 3.0), ("d", "init", "", 4.0)
        )
    ]  # fmt: skip
    found: Any = factorial_runs._newest(SimpleNamespace(results=results), "hessian", "end")
    assert found.path == Path("b")


@pytest.mark.parametrize(("n_batches", "has_interval"), [(LEAST_IMAGES - 1, False), (LEAST_IMAGES, True)])
def test_differences_of_skewed_numbers_need_many_batches_for_an_interval(n_batches: int, has_interval: bool) -> None:
    (ape,) = (q for q in factorial_analysis.QUANTITIES if q.key == "ape")
    rng, none = np.random.default_rng(0), np.zeros((n_batches, 2))
    results = {
        (model, training, name, 0): SimpleNamespace(
            eigenvalues=rng.lognormal(4.0, 0.5, (n_batches, 2)), residuals=none, l2_contribution=none
        )
        for model in ("convnet", "vit")
        for training in ("weak", "strong")
        for name in ("hessian", "hessian_clean")
    }
    read = factorial_analysis._Reader(ape, results, [0])
    condition = ("weak", "clean", "nll")
    assert np.isfinite(read.interval({condition: 1.0}, "difference").half_width) == has_interval
    single = read.interval({condition: 1.0}, "vit")  # of one positive number there is one: that of its logarithm
    assert single.ends is not None
    assert single.low < single.mean < single.high
