"""The trials that a sweep file means: grids, random draws, Bayesian optimization, and early termination."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures.configs.sweep_files import sweep_of
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import distributions, early_termination, search_algorithms, sweep_file


def test_a_grid_varies_its_last_key_fastest() -> None:
    trials = sweep_file.grid(
        sweep_of({"model": {"values": ["vit", "convnet"]}, "seed": {"min": 0, "max": 1}, "test": {"value": False}})
    )
    assert [(t["model"], t["seed"], t["test"]) for t in trials] == [
        ("vit", 0, False), ("vit", 1, False), ("convnet", 0, False), ("convnet", 1, False),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a grid needs a list"):
        sweep_file.grid(sweep_of({"optimizer.lr": {"min": 0.1, "max": 0.2}}))


def test_random_trials_are_the_same_again_and_follow_their_distributions() -> None:
    nodes = {
        "a": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0},
        "b": {"min": 1, "max": 6},
        "c": {"values": ["x", "y"], "probabilities": [0.25, 0.75]},
        "d": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
        "e": {"distribution": "log_uniform", "min": -2.0, "max": 0.0},
        "f": {"distribution": "normal", "mu": 3.0, "sigma": 2.0},
    }
    sweep = sweep_of(nodes, method="random", run_cap=4000)
    drawn = sweep_file.planned(sweep)
    assert drawn[:10] == sweep_file.planned(sweep, 10)
    n = len(drawn)
    # means of the exact laws, within four standard errors
    for values, mean, deviation in (
        ([math.log10(t["a"]) for t in drawn], -2.0, 4 / math.sqrt(12)),
        ([t["b"] for t in drawn], 3.5, math.sqrt(35 / 12)),
        ([t["c"] == "y" for t in drawn], 0.75, math.sqrt(3) / 4),
        ([math.log(t["e"]) for t in drawn], -1.0, 2 / math.sqrt(12)),
        ([t["f"] for t in drawn], 3.0, 2.0),
    ):
        assert abs(sum(values) / n - mean) < 4 * deviation / math.sqrt(n)
    assert {t["d"] for t in drawn} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {t["b"] for t in drawn} == {1, 2, 3, 4, 5, 6}
    with pytest.raises(ConfigError, match="has no end without it"):
        sweep_file.planned(sweep_of(nodes, method="random"))


def test_hyperband_rungs_and_verdicts() -> None:
    assert early_termination.rungs({"type": "hyperband", "min_iter": 3})[:3] == [3, 9, 27]
    assert early_termination.rungs({"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3}) == [3, 9]
    rungs = [2, 4]
    good, bad = [0.1, 0.5, 0.6, 0.7], [0.1, 0.2, 0.3]
    assert early_termination.hopeless([0.1], [good], rungs, 3, True) is None  # no rung reached
    assert early_termination.hopeless(bad, [], rungs, 3, True) is None  # the first to arrive
    assert early_termination.hopeless(bad, [good], rungs, 3, True) == 2  # its best of the first two counts: 0.2 < 0.5
    assert early_termination.hopeless(good, [bad], rungs, 3, True) is None
    assert (
        early_termination.hopeless(bad, [good], rungs, 3, False) is None
    )  # a loss: smaller is better, best 0.1 equals 0.1
    assert early_termination.hopeless([9.0, 8.0], [[1.0, 2.0]], rungs, 3, False) == 2
    four = [[0.1, v] for v in (0.2, 0.3, 0.4, 0.5)]
    kept = [early_termination.hopeless(own, [o for o in four if o is not own], rungs, 2, True) for own in four]
    assert kept == [2, 2, None, None]  # the best half of four


def test_bayes_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = sweep_of({"optimizer.lr": {"min": 0.1, "max": 1.0}}, method="bayes", run_cap=3)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="needs optuna, which is not installed; pip install optuna"):
        search_algorithms.start(sweep, None, {}, tmp_path)


def test_bayes_refuses_the_optuna_of_hydras_sweeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = sweep_of({"optimizer.lr": {"min": 0.1, "max": 1.0}}, method="bayes", run_cap=3)
    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(__version__="2.10.1"))
    with pytest.raises(ConfigError, match=r"needs Optuna >= 4, received 2.10.1 .*; pip install 'vitscope\[optuna\]'"):
        search_algorithms.start(sweep, None, {}, tmp_path)


def test_bayes_learns_and_repeats_what_was_asked(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    nodes = {"optimizer.lr": {"min": 0.0, "max": 1.0}, "seed": {"value": 3}}
    sweep = sweep_of(nodes, method="bayes", run_cap=30)
    first = search_algorithms.start(sweep, None, {}, tmp_path / "first")
    asked: dict[int, dict[str, Any]] = {}
    for index in range(30):
        params = first.ask(index)
        assert params is not None
        asked[index] = params
        first.tell(index, params, -((params["optimizer.lr"] - 0.7) ** 2))
    assert first.ask(30) is None
    late = [asked[index]["optimizer.lr"] for index in range(20, 30)]
    assert sum(abs(value - 0.7) for value in late) / 10 < 0.25  # uniform draws: 0.29 on average
    again = search_algorithms.start(sweep, None, {0: asked[0], 1: asked[1]}, tmp_path / "without a study")
    assert [again.ask(0), again.ask(1)] == [asked[0], asked[1]]
    resumed = search_algorithms.start(sweep, None, {}, tmp_path / "first")
    assert [resumed.ask(index) for index in range(30)] == [asked[index] for index in range(30)]


def test_invocations_of_bayes_propose_one_list_of_trials(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = sweep_of({"optimizer.lr": {"min": 0.0, "max": 1.0}}, method="bayes", run_cap=8)
    first, second = (search_algorithms.start(sweep, None, {}, tmp_path) for _ in range(2))
    asked = [(first if index % 2 else second).ask(index) for index in range(8)]
    assert asked == [(second if index % 2 else first).ask(index) for index in range(8)]
    rates = [params["optimizer.lr"] for params in asked if params is not None]
    assert len(set(rates)) == 8  # no draws are repeated
    first.tell(3, {}, 0.5)
    second.tell(3, {}, 0.25)  # both have seen it end; the first report counts
    again = search_algorithms.start(sweep, None, {}, tmp_path)
    assert [trial.value for trial in again._study.trials if trial.value is not None] == [0.5]


def test_distributions_name_what_they_need() -> None:
    with pytest.raises(ConfigError, match="normal needs sigma"):
        distributions.distribution("a", {"distribution": "normal", "mu": 0})
    assert distributions.distribution("a", {"min": 0, "max": 1}) == "int_uniform"
    assert distributions.distribution("a", {"min": 0.0, "max": 1}) == "uniform"


def test_steps_and_bounds_are_checked() -> None:
    for step in ("1e-3", 0, -1.0, None):
        with pytest.raises(ConfigError, match=r"parameters.a.q.*: not a number greater than 0; write 1.0e-3, not 1e-3"):
            distributions.distribution("a", {"distribution": "q_uniform", "min": 0, "max": 1, "q": step})
    with pytest.raises(ConfigError, match=r"parameters.a.min=1.5: not a whole number"):
        distributions.distribution("a", {"distribution": "int_uniform", "min": 1.5, "max": 8})
    whole = {"distribution": "int_uniform", "min": 1.0, "max": 3}
    assert distributions.listed("a", whole) == [1, 2, 3]
    assert type(distributions.draw({"a": whole}, "seed")["a"]) is int


@pytest.mark.parametrize("method", ["grid", "random"])
@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            {"values": ["x", "y"], "probabilities": [0.5, 0.6]},
            r"probabilities=\[0.5, 0.6\]: they sum to 1.1, expected 1; give",
        ),
        (
            {"values": ["x", "y"], "probabilities": [0.5]},
            r"expected 2 numbers, one for each value; .* such as \[0.5, 0.5\]",
        ),
        ({"values": ["x", "y"], "probabilities": [1.5, -0.5]}, "expected numbers of at least 0"),
        ({"values": ["x", "y"], "probabilities": ["a", 1]}, "expected numbers of at least 0"),
        ({"values": ["x", "y"], "probabilities": 0.5}, "expected 2 numbers"),
        ({"values": []}, r"values=\[\]: values must be a list of at least one value"),
        ({"values": "xy"}, "values=xy: values must be a list of at least one value"),
    ],
)
def test_shares_that_are_no_probabilities_are_one_line(node: dict[str, Any], text: str, method: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sweep_file.planned(sweep_of({"c": node}, method=method, run_cap=1))


def test_shares_rounded_to_four_decimals_are_probabilities() -> None:
    sweep_file.planned(
        sweep_of({"c": {"values": [1, 2, 3], "probabilities": [0.3333] * 3}}, method="random", run_cap=1)
    )
