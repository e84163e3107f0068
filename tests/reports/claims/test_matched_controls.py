"""Which model is AlterNet's control, at which moments both are compared, and on which losses that rests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.claim_effects import ape
from tests.fixtures.runs.report_runs import Given, bench, configuration, other_card, rise, spectrum
from vitscope.reports.claims.matched_controls import has_attention, without_attention
from vitscope.reports.model_costs import Cost
from vitscope.reports.run_entry import Entry
from vitscope.runs.run_dir import Run


def entry(model: str, **changes: Any) -> Entry:
    return Entry(Run(Path("run")), configuration(model, 0, **changes), {}, {}, {}, ())


@pytest.mark.parametrize(
    ("changes", "attends", "is_control"),
    [
        ({}, True, False),
        ({"model__n_msa": [0, 0, 1, 1]}, True, False),
        ({"model__n_msa": [0, 0, 0, 0]}, False, True),
        ({"model__mixer": "conv"}, False, True),
        ({"model__mixer": "conv", "model__n_msa": [0, 0, 1, 1]}, False, True),
        ({"model__mixer": "uniform"}, False, False),
    ],
)
def test_an_alternet_has_attention_or_is_a_control_or_neither(
    changes: dict[str, Any], attends: bool, is_control: bool
) -> None:
    alternet = entry("alternet", **changes)
    assert (has_attention(alternet), without_attention(alternet)) == (attends, is_control)


def test_of_several_controls_the_one_of_the_nearest_cost_is_taken(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {18: Cost(103, 1000), 34: Cost(100, 1010), 50: Cost(100, 960)}
    monkeypatch.setattr(
        Given, "of", lambda self, e: Cost(100, 1000) if e.family == "alternet" else costs[e.config["model"]["depth"]]
    )
    make_run("alternet", measured={"hessian": spectrum(ape=100.0)})
    for depth, value in ((18, 200.0), (34, 300.0), (50, 400.0)):
        make_run("convnet", model__depth=depth, measured={"hessian": spectrum(ape=value)})
    assert "convnet-34" in ape()(bench(tmp_path)).compared


def test_a_model_of_another_setting_is_no_control(make_run: Callable, tmp_path: Path) -> None:
    make_run("alternet", measured={"hessian": spectrum(ape=100.0)})
    make_run("convnet", trainer__max_epochs=9, measured={"hessian": spectrum(ape=200.0)})
    found = ape()(bench(tmp_path))
    assert found.values == {}
    assert "same setting" in found.lacking


def test_losses_match_up_to_a_tenth_of_themselves(make_run: Callable, tmp_path: Path) -> None:
    make_run("alternet", 0, measured={"sharpness": rise(0.1, nll=0.02), "hessian": spectrum()})
    make_run("convnet", 0, measured={"sharpness": rise(0.1, nll=0.05), "hessian": spectrum()})
    make_run("alternet", 1, measured={"sharpness": rise(0.1, nll=0.046), "hessian": spectrum()})
    make_run("convnet", 1, measured={"sharpness": rise(0.1, nll=0.05), "hessian": spectrum()})
    assert set(ape(matched="nll")(bench(tmp_path)).values) == {1}


def test_initial_weights_are_no_moment_of_a_training(make_run: Callable, tmp_path: Path) -> None:
    """Before its first step a network may have the loss at which another one ends."""
    losses = {"init": 1.0, "epoch-0000": 0.95, "end": 0.4}
    measured = {f"sharpness@{tag}": rise(0.1, nll=loss) for tag, loss in losses.items()}
    apes = {f"hessian@{tag}": spectrum(ape=value) for tag, value in zip(losses, (50.0, 50.0, 10.0))}
    apes["hessian@init"] = spectrum(ape=1.0)
    make_run("alternet", measured={**measured, **apes})
    make_run("convnet", measured={"sharpness": rise(0.1, nll=1.0), "hessian": spectrum(ape=50.0)})
    assert ape(matched="nll")(bench(tmp_path)).values == pytest.approx({0: 0.0}, abs=1e-12)


def test_losses_on_test_images_match_nothing(make_run: Callable, tmp_path: Path) -> None:
    for model in ("alternet", "convnet"):
        sharpness = rise(0.1, nll=1.0, card=other_card(split="test"))
        make_run(model, measured={"sharpness": sharpness, "hessian": spectrum()})
    assert ape(matched="nll")(bench(tmp_path)).values == {}
