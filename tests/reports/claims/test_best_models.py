"""The choice of the best model and recipe of each side, by validation accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.report_runs import bench
from vitscope.reports.claims.best_models import CNNS, VITS, best_model_difference
from vitscope.reports.claims.effect_sizes import Effect
from vitscope.reports.run_entry import Entry


def best_against_cnns(folder: Path) -> Effect:
    b = bench(folder)
    return best_model_difference(b, CNNS, b.metric("test/accuracy"), "test accuracy")


@pytest.fixture
def accuracies(make_run: Callable) -> Callable[..., None]:
    """Write a run with a validation and a test accuracy."""

    def make(model: str, lr: float, val: float, test: float, seed: int = 0, **changes: Any) -> None:
        make_run(model, seed, optimizer__lr=lr, metrics={"val/accuracy": val, "test/accuracy": test}, **changes)

    return make


def test_winners_are_chosen_on_validation_and_need_two_recipes(accuracies: Callable, tmp_path: Path) -> None:
    accuracies("alternet", 0.1, 0.6, 0.61)
    accuracies("alternet", 0.2, 0.5, 0.99)  # better on test images, which do not choose
    accuracies("convnet", 0.1, 0.4, 0.41)
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: 0.2}, rel=1e-12)
    assert found.blocked == "not each at its best recipe: 2 and 1 tried"
    accuracies("convnet", 0.2, 0.3, 0.5)
    assert best_against_cnns(tmp_path).blocked == ""


def test_winners_are_chosen_on_seeds_that_both_have(accuracies: Callable, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        easy = 0.3 * (seed == 2)
        accuracies("alternet", 0.1, 0.4 + easy, 0.41 + easy, seed)
        accuracies("convnet", 0.1, 0.2 + easy, 0.2 + easy, seed)
        accuracies("convnet", 0.2, 0.1 + easy, 0.1 + easy, seed)
    accuracies("alternet", 0.2, 0.6, 0.99, 2)  # its mean is higher, since seed 2 is easy; 0.1 worse at that seed
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx(dict.fromkeys(range(3), 0.21), rel=1e-12)
    assert found.refused == ""


def test_a_model_tried_in_one_recipe_is_no_candidate_beside_one_tried_in_two(
    accuracies: Callable, tmp_path: Path
) -> None:
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.7 - lr)
        accuracies("convnet", lr, 0.4 - lr, 0.4 - lr)
    accuracies("alternet", 0.1, 0.9, 0.9, model__placement="stage_start")
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: 0.6 - 0.3}, rel=1e-12)
    assert found.blocked == ""


@pytest.mark.parametrize(
    ("val", "lrs", "difference", "blocked"),
    [
        (0.3, (0.1,), 0.5 - 0.3, ""),
        (0.6, (0.1,), 0.5 - 0.6, "not each at its best recipe: 2 and 1 tried"),
        (0.6, (0.1, 0.2), 0.5 - 0.6, ""),
    ],
)
def test_an_alternet_with_convolutions_alone_is_a_convnet_whose_advantage_counts_with_one_recipe(
    val: float, lrs: tuple[float, ...], difference: float, blocked: str, accuracies: Callable, tmp_path: Path
) -> None:
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.6 - lr)
        accuracies("convnet", lr, 0.4 - lr, 0.4 - lr)
    for lr in lrs:
        accuracies("alternet", lr, val + 0.1 - lr, val + 0.1 - lr, model__mixer="conv")
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: difference}, rel=1e-12)
    assert (found.blocked, found.decides_nothing) == (blocked, bool(blocked))


def test_a_shorter_training_is_no_recipe_and_is_compared_with_none(accuracies: Callable, tmp_path: Path) -> None:
    accuracies("alternet", 0.1, 0.6, 0.6)
    accuracies("alternet", 0.1, 0.7, 0.7, trainer__max_epochs=1)
    for lr in (0.1, 0.2):
        accuracies("convnet", lr, 0.4 - lr, 0.4 - lr, trainer__max_epochs=1)
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: 0.7 - 0.3}, rel=1e-12)
    assert found.blocked == "not each at its best recipe: 1 and 2 tried"


def test_of_equal_validation_accuracies_the_one_of_more_seeds_stays(accuracies: Callable, tmp_path: Path) -> None:
    for seed in (0, 1):
        accuracies("alternet", 0.1, 0.5, 0.61, seed)
        for lr in (0.1, 0.2):
            accuracies("convnet", lr, 0.4 - lr, 0.4 - lr, seed)
    accuracies("alternet", 0.2, 0.5, 0.99)
    assert best_against_cnns(tmp_path).values == pytest.approx({0: 0.31, 1: 0.31}, rel=1e-12)


def test_a_setting_with_two_recipes_a_side_goes_before_one_with_more_seeds(
    accuracies: Callable, tmp_path: Path
) -> None:
    for seed in range(3):
        accuracies("alternet", 0.1, 0.6, 0.9, seed)
        accuracies("convnet", 0.1, 0.4, 0.1, seed)
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.6 - lr, trainer__max_epochs=1)
        accuracies("convnet", lr, 0.4 - lr, 0.4 - lr, trainer__max_epochs=1)
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: 0.2}, rel=1e-12)
    assert found.blocked == ""


def test_batches_of_other_sizes_are_other_recipes_of_one_setting(accuracies: Callable, tmp_path: Path) -> None:
    for size, val in ((16, 0.6), (32, 0.5)):
        accuracies("alternet", 0.1, val, val, data__batch_size=size)
    for size, val in ((64, 0.4), (128, 0.3)):
        accuracies("convnet", 0.1, val, val, data__batch_size=size)
    found = best_against_cnns(tmp_path)
    assert found.values == pytest.approx({0: 0.6 - 0.4}, rel=1e-12)
    assert found.blocked == ""


def test_the_fewest_recipes_of_a_side_are_stated(accuracies: Callable, tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.6 - lr)
    for lr in (0.1, 0.2, 0.3):
        accuracies("alternet", lr, 0.5 - lr, 0.5 - lr, model__placement="stage_start")
    accuracies("convnet", 0.1, 0.4, 0.4)
    assert best_against_cnns(tmp_path).blocked == "not each at its best recipe: 2 and 1 tried"


def test_a_better_rival_without_what_is_compared_blocks_support(accuracies: Callable, tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.6 - lr)
        accuracies("convnet", lr, 0.3 - lr, 0.3 - lr)
        accuracies("convnet", lr, 0.4 - lr, 0.4 - lr, model__depth=34)
    b = bench(tmp_path)
    accuracy = b.metric("test/accuracy")

    def without(depth: int) -> Effect:
        """Return the difference in a number that ConvNets of one depth lack."""

        def read(entry: Entry) -> float | None:
            is_left_out = entry.family == "convnet" and entry.config["model"]["depth"] == depth
            return None if is_left_out else accuracy(entry)

        return best_model_difference(b, CNNS, read, "corruption")

    assert without(18).values == pytest.approx({0: 0.2}, rel=1e-12)
    assert without(18).blocked == ""
    assert without(34).values == pytest.approx({0: 0.3}, rel=1e-12)
    assert without(34).blocked == "convnet-34, lr 0.1 has a higher validation accuracy and lacks corruption"
    assert not without(34).decides_nothing


def test_swin_and_pit_are_among_the_vits(accuracies: Callable, tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        accuracies("alternet", lr, 0.6 - lr, 0.6 - lr)
        accuracies("vit", lr, 0.4 - lr, 0.4 - lr)
        accuracies("pit", lr, 0.5 - lr, 0.5 - lr)
    b = bench(tmp_path)
    found = best_model_difference(b, VITS, b.metric("test/accuracy"), "test accuracy")
    assert found.values == pytest.approx({0: 0.1}, rel=1e-12)
    assert found.blocked == ""
