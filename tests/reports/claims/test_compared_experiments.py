"""Which experiments a statistic of a claim compares, where several could be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.runs.claim_effects import write_scalars
from tests.fixtures.runs.report_runs import Given, bench, curve, other_card, rise, spectrum
from vitscope.reports.claims import claim_statistics
from vitscope.reports.claims.effect_sizes import plainest
from vitscope.reports.model_costs import Cost


def test_placements_of_other_numbers_of_parameters_are_not_compared(
    make_run: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    parameters = {"stage_end": 1000, "stage_start": 1009, "late": 1012}  # at most one percent apart
    monkeypatch.setattr(Given, "of", lambda self, e: Cost(parameters[e.config["model"]["placement"]], 10))
    for where, accuracy in (("stage_end", 0.6), ("stage_start", 0.5), ("late", 0.4)):
        make_run("alternet", model__placement=where, metrics={"test/accuracy": accuracy})
    found = claim_statistics.placement_difference(bench(tmp_path))
    assert found.values == pytest.approx({0: 0.1}, rel=1e-12)


def test_three_of_the_four_families_are_no_trend_over_bias(make_run: Callable, tmp_path: Path) -> None:
    for model, nep in {"vit": 0.5, "swin": 0.2, "convnet": 0.0}.items():
        make_run(model, measured={"hessian": spectrum(nep)})
    found = claim_statistics.bias_trend(bench(tmp_path))
    assert (found.values, found.lacking) == ({}, "ViT, PiT, Swin and ResNet in one setting, with hessian")


@pytest.mark.parametrize(
    ("neps", "blocked"),
    [
        ((0.5, 0.3, 0.3, 0.2), ""),
        ((0.5, 0.3, 0.1, 0.2), "the means are not monotone"),
        ((0.1, 0.2, 0.3, 0.4), ""),  # the opposite of the claim
    ],
)
def test_a_trend_may_rest_and_not_turn(
    make_run: Callable, tmp_path: Path, neps: tuple[float, ...], blocked: str
) -> None:
    for model, nep in zip(("vit", "pit", "swin", "convnet"), neps, strict=True):
        make_run(model, measured={"hessian": spectrum(nep)})
    assert claim_statistics.bias_trend(bench(tmp_path)).blocked == blocked


def test_of_two_measures_of_the_training_loss_the_slice_is_taken(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (1.0, 0.1, 0.01):
        card = other_card(data=f"photos, {fraction}")
        measured = {"slice": curve(card), "sharpness": rise(0.1, nll=9.0 - 10 * fraction, card=card)}
        make_run("vit", data__fraction=fraction, measured=measured)
    b = bench(tmp_path)
    read = claim_statistics.training_nll(b)
    nll = claim_statistics.data_trend(b, read, -1, fixed="epochs", requirement="slice")
    assert nll.values == pytest.approx({0: 0.0}, abs=1e-12)
    of_sharpness = claim_statistics.data_trend(b, read[1], -1, fixed="epochs", requirement="sharpness")
    x, y = np.log([1.0, 0.1, 0.01]), [-1.0, 8.0, 8.9]
    assert of_sharpness.values == pytest.approx({0: np.polyfit(x, y, 1)[0]}, rel=1e-9)


def test_of_equally_plain_models_the_one_of_more_seeds_is_taken(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, optimizer__lr=0.1)
    for seed in range(3):
        make_run("vit", seed, optimizer__lr=0.2)
    make_run("vit", 0, optimizer__lr=0.3)
    chosen = plainest(bench(tmp_path).groups(lambda _: True))
    assert chosen is not None
    assert len(chosen) == 3


def test_a_network_that_is_no_better_than_chance_has_lost_nothing_to_noise(make_run: Callable, tmp_path: Path) -> None:
    """Relative to an accuracy below chance the loss would have the other sign."""
    for seed, clean in enumerate((0.5, 1 / 16, 0.05)):
        for model in ("vit", "convnet"):
            scalars = {"high_minus_low": 0.1, "clean_accuracy": clean if model == "vit" else 0.6}
            write_scalars(make_run(model, seed), "frequency_noise_robustness", scalars)
    assert set(claim_statistics.noise_interaction(bench(tmp_path)).values) == {0}


def test_a_data_module_without_fractions_reads_all_images(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (1.0, 0.1, 0.01):
        card = other_card(data=f"photos, {fraction}")
        run = make_run("vit", data__fraction=fraction, measured={"hessian": spectrum(0.3 + fraction, card=card)})
        if fraction == 1:
            text = (run.path / "config.yaml").read_text()
            (run.path / "config.yaml").write_text(text.replace("  fraction: 1.0\n", ""))
    b = bench(tmp_path)
    found = claim_statistics.data_trend(b, b.scalar(*claim_statistics.NEP), -1, fixed="epochs", requirement="hessian")
    assert found.values == pytest.approx({0: np.polyfit(np.log([1.0, 0.1, 0.01]), [1.3, 0.4, 0.31], 1)[0]}, rel=1e-9)
