"""Numbers of steps from which the time of a training is estimated, and which existing runs tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reproduce.test_cost_estimates import CFG, planned, write_short_run
from vitscope.reproduce import run_kinds
from vitscope.reproduce.cost_estimates import Rates, _n_checkpoints, estimate
from vitscope.reproduce.planned_work import Measurement
from vitscope.reproduce.work_listing import start_text


@pytest.mark.parametrize(
    ("changes", "n_steps"),
    [
        ({}, 305 * 450),
        ({"data__batch_size": 101}, 305 * 446),  # 445.5 batches
        ({"data__batch_size": 101, "data__drop_last": True}, 305 * 445),
        ({"data__fraction": 0.1}, 305 * 45),
        ({"trainer__limit_train_batches": 10}, 305 * 10),
        ({"trainer__limit_train_batches": 1000}, 305 * 450),
        ({"trainer__limit_train_batches": 0.5}, 305 * 225),
        ({"trainer__accumulate_grad_batches": 4}, 305 * 113),  # the last step of an epoch is of two batches
        ({"trainer__max_steps": 1000}, 1000),
        ({"trainer__max_steps": 1000, "trainer__max_epochs": 1}, 450),
        ({"trainer__max_steps": 7, "trainer__max_epochs": -1}, 7),
    ],
    ids=str,
)
def test_steps_of_a_training(changes: dict[str, Any], n_steps: int) -> None:
    assert Rates([], {}, {"cifar100": 45000})._planned_steps(planned(**changes).settings) == n_steps


def test_epochs_after_the_last_have_no_checkpoint() -> None:
    kept = {"callbacks__checkpoint__snapshots": [0, 304, 305]}  # and the first network, the best and the last one
    assert _n_checkpoints(planned(**kept).settings) == 5
    assert _n_checkpoints(planned(trainer__max_epochs=-1, trainer__max_steps=9, **kept).settings) == 6


def write_steps(folder: Path, wall_s: float, n_steps: int, seconds_per_step: float) -> None:
    """Write a run of ``write_short_run`` with the journal of another number of steps."""
    write_short_run(folder, wall_s=wall_s)
    times = {step: 1000.0 + seconds_per_step * step for step in range(n_steps)}
    rows = [{"step": step, "epoch": 0, "time": time, "train/loss": 1.0} for step, time in times.items()]
    (folder / "short" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_longest_run_of_a_kind_tells_its_rate(tmp_path: Path, names: str) -> None:
    write_steps(tmp_path / names[0], 50.0, 450, 0.1)
    write_steps(tmp_path / names[1], 50.0, 100, 0.2)
    rate = Rates([tmp_path], {}).training_seconds(planned(trainer__max_steps=1000))
    assert rate == pytest.approx(1000 * 0.1 + 50.0 - 450 * 0.1)


def test_a_few_steps_tell_the_time_of_as_many_from_the_start(tmp_path: Path) -> None:
    write_steps(tmp_path, 9.0, 3, 0.1)
    rates = Rates([tmp_path], {})
    assert rates.training_seconds(planned(trainer__max_steps=3)) == 9.0
    assert rates.training_seconds(planned(trainer__max_steps=4)) is None
    assert rates.training_seconds(planned(state="resume", trainer__max_steps=3)) is None


def test_a_stated_rate_counts_once_for_trials_that_share_a_training() -> None:
    stated = {"rates": {"seconds_per_training": 7, "source": "a page"}}
    results = [Measurement("hessian", "end", {"n_top": n}) for n in (1, 2)]
    costs = estimate([planned(missing=(result,)) for result in results], Rates([], stated))
    assert [(cost.seconds, cost.unknown_time) for cost in costs] == [(7.0, 0), (0.0, 0)]


def test_trainings_to_resume_are_trainings_to_do() -> None:
    trials = [planned(), planned("b", "resume"), planned("c", "exists")]
    text = start_text(trials, estimate(trials, Rates([], {})), 1)
    assert text.startswith("to do: 2 trainings, 0 finished runs to measure")


def test_a_measurement_takes_as_long_as_one_with_another_seed() -> None:
    cfg = {**CFG, "seed": 3}
    kind = run_kinds.measurement_kind(cfg, "hessian", {"n_top": 5, "seed": 3, "probe": {"n_images": 8, "seed": 3}})
    other = {"n_top": 5, "seed": 4, "on_error": "warn", "when": {"end": True}, "probe": {"n_images": 8, "seed": 4}}
    assert run_kinds.measurement_kind(CFG, "hessian", other) == kind
    for changes in ({"n_top": 6}, {"probe": {"n_images": 9}}):
        assert run_kinds.measurement_kind(CFG, "hessian", {**other, **changes}) != kind
