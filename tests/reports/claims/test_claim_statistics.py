"""The statistics of claims, computed from run folders whose numbers are known."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.runs.claim_effects import ape, write_scalars
from tests.fixtures.runs.report_runs import CARD, Given, bench, curve, other_card, rise, spectrum
from vitscope.diagnostics.fourier.branch_transfer import BranchTransferResult
from vitscope.reports.claims import claim_statistics, claim_verdicts, effect_sizes
from vitscope.reports.claims.claims import CLAIMS
from vitscope.reports.claims.effect_sizes import balanced_means, balanced_parts, plainest
from vitscope.reports.claims.matched_controls import flattening
from vitscope.reports.model_costs import Cost

SEEDS = range(5)


def test_alternet_is_paired_by_seed_with_the_control_of_equal_cost(make_run: Callable, tmp_path: Path) -> None:
    for seed in SEEDS:
        make_run("alternet", seed, measured={"hessian": spectrum(ape=100.0 + seed)})
        make_run("convnet", seed + 1, measured={"hessian": spectrum(ape=200.0 + seed)})  # seeds 1 to 5
        make_run("convnet", seed, data__fraction=0.5, measured={"hessian": spectrum(ape=1.0)})  # another setting
    found = ape()(bench(tmp_path))
    expected = {seed: math.log((100 + seed) / (200 + seed - 1)) for seed in range(1, 5)}
    assert found.values == pytest.approx(expected, rel=1e-12)
    assert "alternet-18" in found.compared


def test_a_control_that_costs_more_or_less_is_none(make_run: Callable, tmp_path: Path, monkeypatch: Any) -> None:
    make_run("alternet", measured={"hessian": spectrum()})
    make_run("convnet", measured={"hessian": spectrum()})
    monkeypatch.setattr(
        Given, "known", {"alternet": Cost(100, 1000), "convnet": Cost(104, 900)}
    )  # 10% fewer operations
    found = ape()(bench(tmp_path))
    assert found.values == {}
    assert "within 5%" in found.lacking


def test_the_twin_differs_in_the_mixer_alone(make_run: Callable, tmp_path: Path) -> None:
    make_run("alternet", measured={"sharpness": rise(0.2)})
    make_run("alternet", model__mixer="blur", model__blur_size=2, measured={"sharpness": rise(0.5)})
    make_run("alternet", model__mixer="uniform", optimizer__lr=0.1, measured={"sharpness": rise(0.9)})
    b = bench(tmp_path)
    found = flattening(b, "sharpness", "rise_r0.1", control="blur", matched="epoch", log=False)
    assert found.values == pytest.approx({0: -0.3}, rel=1e-12)
    assert "mixer=uniform" in ape("uniform")(b).lacking


def test_matched_nll_takes_the_moment_whose_training_loss_is_nearest(make_run: Callable, tmp_path: Path) -> None:
    def measured(losses: Mapping[str, float], apes: Mapping[str, float]) -> dict[str, Any]:
        made: dict[str, Any] = {f"sharpness@{tag}": rise(0.1, nll=loss) for tag, loss in losses.items()}
        return made | {f"hessian@{tag}": spectrum(ape=value) for tag, value in apes.items()}

    fast = {"epoch-0000": 1.5, "epoch-0001": 0.98, "end": 0.4}
    make_run("alternet", measured=measured(fast, {"epoch-0000": 10.0, "epoch-0001": 20.0, "end": 30.0}))
    make_run("convnet", measured=measured({"epoch-0000": 2.0, "end": 1.0}, {"epoch-0000": 5.0, "end": 50.0}))
    assert ape(matched="nll")(bench(tmp_path)).values == pytest.approx({0: math.log(20 / 50)}, rel=1e-12)
    assert ape()(bench(tmp_path)).values == pytest.approx({0: math.log(30 / 50)}, rel=1e-12)


def test_losses_that_never_meet_are_not_matched(make_run: Callable, tmp_path: Path) -> None:
    make_run("alternet", measured={"sharpness": rise(0.1, nll=0.5), "hessian": spectrum()})
    make_run("convnet", measured={"sharpness": rise(0.1, nll=1.0), "hessian": spectrum()})
    found = ape(matched="nll")(bench(tmp_path))
    assert found.values == {}
    assert "several epochs" in found.lacking


def test_the_trend_over_bias_is_the_least_squares_slope(make_run: Callable, tmp_path: Path) -> None:
    neps = {"vit": 0.5, "pit": 0.3, "swin": 0.2, "convnet": 0.0}
    for seed in (0, 1):
        for model, nep in neps.items():
            make_run(model, seed, measured={"hessian": spectrum(nep + 0.01 * seed * (model == "vit"))})
    make_run("vit", 0, model__pool="gap", measured={"hessian": spectrum(0.9)})  # not the plainest
    found = claim_statistics.bias_trend(bench(tmp_path))
    slopes = {s: np.polyfit(range(4), [0.5 + 0.01 * s, 0.3, 0.2, 0.0], 1)[0] for s in (0, 1)}
    assert found.values == pytest.approx(slopes, rel=1e-9)
    assert found.blocked == ""
    assert found.compared == "vit-tiny, pool default → pit-tiny → swin-tiny → convnet-18"


def test_a_trend_whose_means_turn_supports_nothing(make_run: Callable, tmp_path: Path) -> None:
    for model, nep in {"vit": 0.5, "pit": 0.1, "swin": 0.2, "convnet": 0.0}.items():
        make_run(model, measured={"hessian": spectrum(nep)})
    assert claim_statistics.bias_trend(bench(tmp_path)).blocked == "the means are not monotone"


def test_kernels_go_from_local_to_global(make_run: Callable, tmp_path: Path) -> None:
    for kernel, nep, accuracy in ((3, 0.1, 0.5), (5, 0.2, 0.6), ("global", 0.4, 0.45)):
        metrics = {"test/accuracy": accuracy}
        make_run("convit", model__kernel_size=kernel, measured={"hessian": spectrum(nep)}, metrics=metrics)
    b = bench(tmp_path)
    assert claim_statistics.kernel_trend(b).values == pytest.approx({0: 0.15}, rel=1e-9)
    read = b.metric("test/accuracy")
    assert claim_statistics.kernel_difference(b, read, 5, "").values == pytest.approx({0: 0.15}, rel=1e-9)
    assert claim_statistics.kernel_difference(b, read, 7, "").lacking == "convit with kernel_size 7 and global"


def test_a_longer_chain_without_measurements_does_not_hide_a_measured_one(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (0.01, 0.1, 1.0):
        card = other_card(data=f"photos, {fraction:g}")
        nep = 0.2 - 0.05 * math.log10(fraction)
        make_run("vit", data__fraction=fraction, measured={"hessian": spectrum(nep, card=card)})
    make_run("vit", data__fraction=0.5)  # a position of the same chain that was not measured
    for fraction in (0.01, 0.02, 0.1, 0.5, 1.0):
        make_run("vit", data__fraction=fraction, trainer__max_epochs=9)
    for kernel, nep in ((3, 0.1), (5, 0.2), ("global", 0.4)):
        make_run("convit", model__kernel_size=kernel, measured={"hessian": spectrum(nep)})
    for kernel in (3, 5, 7, "global"):
        make_run("convit", model__kernel_size=kernel, trainer__max_epochs=9)
    for model, nep in (("vit", 0.4), ("pit", 0.3), ("swin", 0.2), ("convnet", 0.1)):
        make_run(model, seed=5, trainer__max_epochs=2, measured={"hessian": spectrum(nep)})
        for seed in (5, 6):
            make_run(model, seed=seed, trainer__max_epochs=9)
    b = bench(tmp_path)
    nep = b.scalar(*claim_statistics.NEP)
    effect = claim_statistics.data_trend(b, nep, -1, fixed="epochs", requirement="hessian")
    assert effect.values == pytest.approx({0: -0.05 / math.log(10)}, rel=1e-9)
    assert claim_statistics.kernel_trend(b).values == pytest.approx({0: 0.15}, rel=1e-9)
    assert claim_statistics.kernel_difference(b, nep, 5, "").values == pytest.approx({0: -0.2}, rel=1e-9)
    assert claim_statistics.bias_trend(b).values == pytest.approx({5: -0.1}, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "is_comparable"),
    [
        ({"warmup_epochs": 5.0}, False),
        ({"warmup_epochs": 5.0, "warmup_steps": None}, False),
        ({"warmup_epochs": 5.0, "warmup_steps": 20}, True),
        ({"warmup_epochs": 5.0, "warmup_steps": 0}, True),
        ({"warmup_epochs": 0.0, "warmup_steps": None}, True),
    ],
)
def test_trainings_of_equal_steps_are_compared_with_equal_warm_ups(
    make_run: Callable, tmp_path: Path, schedule: dict, is_comparable: bool
) -> None:
    for fraction in (0.01, 0.1, 1.0):
        card = other_card(data=f"photos, {fraction:g}")
        make_run(
            "vit",
            data__fraction=fraction,
            trainer__max_steps=100,
            optimizer__schedule=schedule,
            measured={"hessian": spectrum(0.2 - 0.05 * math.log10(fraction), card=card)},
        )
    b = bench(tmp_path)
    nep = b.scalar(*claim_statistics.NEP)
    effect = claim_statistics.data_trend(b, nep, -1, fixed="steps", requirement="hessian")
    expected = "ViTs at three data.fraction and one trainer.max_steps and optimizer.schedule.warmup_steps, with hessian"
    assert (bool(effect.values), effect.lacking) == (is_comparable, "" if is_comparable else expected)


def test_the_trend_over_data_keeps_epochs_or_steps_fixed(make_run: Callable, tmp_path: Path) -> None:
    for fraction in (0.01, 0.1, 1.0):
        card = other_card(data=f"photos, {fraction:g}")
        nep = 0.2 - 0.05 * math.log10(fraction)
        measured = {"hessian": spectrum(nep, card=card), "slice": curve(card)}
        make_run("vit", data__fraction=fraction, measured=measured, metrics={"test/accuracy": 0.5 + fraction / 10})
        make_run("vit", data__fraction=fraction, trainer__max_steps=100, measured={"hessian": spectrum(0.3, card=card)})
    b = bench(tmp_path)
    fixed_epochs = claim_statistics.data_trend(
        b, b.scalar(*claim_statistics.NEP), -1, fixed="epochs", requirement="hessian"
    )
    assert fixed_epochs.values == pytest.approx({0: -0.05 / math.log(10)}, rel=1e-9)
    fixed_steps = claim_statistics.data_trend(
        b, b.scalar(*claim_statistics.NEP), -1, fixed="steps", requirement="hessian"
    )
    assert fixed_steps.values == pytest.approx({0: 0.0}, abs=1e-12)
    error = claim_statistics.data_trend(b, claim_statistics.test_error(b), -1, fixed="epochs", requirement="accuracy")
    assert error.values[0] < 0
    nll = claim_statistics.data_trend(b, claim_statistics.training_nll(b), -1, fixed="epochs", requirement="slice")
    assert nll.values == pytest.approx({0: 0.0}, abs=1e-12)


def test_kinds_are_averaged_over_models_that_share_their_seeds(make_run: Callable, tmp_path: Path) -> None:
    for model, base in (("vit", -0.2), ("alternet", -0.4)):
        for seed in (0, 1):
            write_scalars(make_run(model, seed), "feature_map_variance", {"log_variance_ratio_msa": base + seed})
    write_scalars(make_run("swin", 0), "feature_map_variance", {"log_variance_ratio_msa": 9.0})  # one seed only
    for seed in (0, 1):  # a control, and a baseline
        uniform = make_run("alternet", seed, model__mixer="uniform")
        write_scalars(uniform, "feature_map_variance", {"log_variance_ratio_msa": 7.0})
        random = make_run("vit", seed, data__random_labels=True)
        write_scalars(random, "feature_map_variance", {"log_variance_ratio_msa": 5.0})
    found = claim_statistics.mean_by_kind(bench(tmp_path), "feature_map_variance", "log_variance_ratio_msa")
    assert found.values == pytest.approx({0: -0.3, 1: 0.7}, rel=1e-9)
    assert "swin" not in found.compared
    assert re.fullmatch("swin.* left out: it has 1 of the 2 seeds", found.refused)
    assert re.fullmatch("alternet.*: 0.1; vit.*: 0.3|vit.*: 0.3; alternet.*: 0.1", found.compared)  # each one's mean
    assert [len(values) for _, values in found.parts] == [2, 2]
    assert balanced_means([]) == {}


def test_the_models_and_seeds_of_a_mean_are_those_with_the_most_values() -> None:
    late, early = dict.fromkeys(range(8), 1.0), dict.fromkeys(range(7), -3.0)
    assert balanced_means([late, early, early]) == dict.fromkeys(range(7), -5 / 3)  # one model is ahead by a seed
    assert balanced_parts([late, early, early]) == ([0, 1, 2], list(range(7)))
    assert balanced_parts([{0: 1.0}, late, {}]) == ([1], list(range(8)))
    assert balanced_parts([{0: 1.0}, {0: 2.0, 1: 2.0}]) == ([0, 1], [0])  # of equal numbers, more models
    assert balanced_parts([{0: 1.0}, {1: 2.0}]) == ([], [])  # neither comes first
    assert balanced_parts([]) == ([], [])


def test_branch_transfer_counts_only_beside_the_initial_model(make_run: Callable, tmp_path: Path) -> None:
    one, none = np.array([-0.5]), np.full(1, np.nan)
    trained = BranchTransferResult(
        units=("a",), kinds=("msa",), stages=np.ones(1), depths=np.zeros(1), normalized_frequency=(np.arange(3.0),),
        transfer=(np.zeros(3),), contrast=one, contrast_half_width=one, contrast_own=one, contrast_initial=none,
        replicates=np.zeros((2, 1)), kind_names=("msa",), kind_contrast=one, kind_low=one, kind_high=one,
        reference="initial", level=0.95, seed=0, n_images=4, card=CARD,
    )  # fmt: skip
    make_run("vit", 0, measured={"branch_transfer": trained})
    make_run("vit", 1, measured={"branch_transfer": dataclasses.replace(trained, reference="none")})
    b = bench(tmp_path)
    found = claim_statistics.mean_by_kind(
        b, "branch_transfer", "contrast_msa", claim_statistics.has_initial_reference(b)
    )
    assert found.values == {0: -0.5}


def test_noise_is_relative_to_what_there_was_to_lose(make_run: Callable, tmp_path: Path) -> None:
    equal = {"solver": {"construction": "equal_rms"}}
    for model, contrast, clean in (("vit", 0.1, 0.5), ("convnet", -0.2, 0.6)):
        scalars = {"high_minus_low": contrast, "clean_accuracy": clean}
        write_scalars(make_run(model), "frequency_noise_robustness", scalars, **equal)
    found = claim_statistics.noise_interaction(bench(tmp_path))
    chance = 1 / 16
    assert found.values == pytest.approx({0: -0.1 / (0.5 - chance) - 0.2 / (0.6 - chance)}, rel=1e-12)


def test_noise_is_compared_in_the_setting_with_the_most_seeds(make_run: Callable, tmp_path: Path) -> None:
    equal = {"solver": {"construction": "equal_rms"}}
    for epochs, seeds in ((1, 1), (3, 2), (5, 1)):
        for model, contrast in (("vit", 0.1 * epochs), ("convnet", 0.0)):
            for seed in range(seeds):
                run = make_run(model, seed, trainer__max_epochs=epochs)
                write_scalars(
                    run, "frequency_noise_robustness", {"high_minus_low": contrast, "clean_accuracy": 0.5}, **equal
                )
    make_run("vit", 0, trainer__max_epochs=3, model__depth=12)  # nearer to the defaults, and not measured
    found = claim_statistics.noise_interaction(bench(tmp_path))
    assert found.values == pytest.approx(dict.fromkeys(range(2), -0.3 / (0.5 - 1 / 16)), rel=1e-12)


def test_the_official_noise_decides_nothing(make_run: Callable, tmp_path: Path) -> None:
    for model in ("vit", "convnet"):
        scalars = {"high_minus_low": 0.1, "clean_accuracy": 0.5}
        write_scalars(make_run(model), "frequency_noise_robustness", scalars, solver={"construction": "official"})
    assert claim_statistics.noise_interaction(bench(tmp_path)).values == {}


def test_placements_are_compared_at_equal_parameters(make_run: Callable, tmp_path: Path) -> None:
    for where, accuracy in (("stage_end", 0.6), ("stage_start", 0.5), ("late", 0.4)):
        make_run("alternet", model__placement=where, metrics={"test/accuracy": accuracy})
    found = claim_statistics.placement_difference(bench(tmp_path))
    assert found.values == pytest.approx({0: 0.15}, rel=1e-12)  # mean of 0.1 and 0.2


def test_the_plainest_model_has_the_fewest_changed_options(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", model__pool="gap", model__patch_size=4)
    make_run("vit", model__pool="cls", model__patch_size=4)
    groups = bench(tmp_path).groups(lambda _: True)
    chosen = plainest(groups)
    assert chosen is not None
    assert chosen[0].config["model"]["pool"] == "cls"


@pytest.mark.parametrize(
    ("claim", "measure", "scalar"),
    [("blocks_by_stage", "cka", "block_structure"), ("stage_end_msa", "lesion", "stage_end_msa_nll_excess")],
)
def test_claims_about_stages_are_about_networks_with_several(
    make_run: Callable, tmp_path: Path, claim: str, measure: str, scalar: str
) -> None:
    for model, value in (("swin", 0.2), ("vit", 0.9)):  # older results state a number of a single stage too
        write_scalars(make_run(model), measure, {scalar: value})
    (judged,) = claim_verdicts.judge(bench(tmp_path), [c for c in CLAIMS if c.name == claim])
    assert judged.findings[0].effect.values == pytest.approx({0: 0.2}, rel=1e-12)


def test_a_lesion_of_a_single_stage_says_nothing_about_the_ends_of_stages(make_run: Callable, tmp_path: Path) -> None:
    for model, n_stages, value in (("swin", 3, 0.2), ("pit", 1, 0.9), ("alternet", 4, 0.4)):
        write_scalars(make_run(model), "lesion", {"n_stages": n_stages, "stage_end_msa_nll_excess": value})
    (judged,) = claim_verdicts.judge(bench(tmp_path), [c for c in CLAIMS if c.name == "stage_end_msa"])
    assert judged.findings[0].effect.values == pytest.approx({0: 0.3}, rel=1e-12)


@pytest.mark.parametrize(
    ("convnet", "pit", "verdict"),
    [(0.4, 0.1, "supported"), (0.4, -0.1, "inconclusive"), (-0.4, -0.1, "contradicted"), (-0.4, 0.1, "inconclusive")],
)
def test_a_mean_decides_nothing_where_the_networks_disagree(
    make_run: Callable, tmp_path: Path, convnet: float, pit: float, verdict: str
) -> None:
    for seed in range(6):
        for model, blocks in (("convnet", convnet), ("pit", pit)):
            write_scalars(make_run(model, seed), "cka", {"block_structure": blocks * (1 + 0.01 * seed)})
    (judged,) = claim_verdicts.judge(bench(tmp_path), [c for c in CLAIMS if c.name == "blocks_by_stage"])
    assert judged.verdict == verdict
    disagreement = "the networks disagree: the opposite of the mean holds for pit-tiny"
    assert (disagreement in judged.reason) == (verdict == "inconclusive")
    assert math.isnan(judged.p_holm) is False  # it counts in the correction over claims


@pytest.mark.parametrize(
    ("sign", "seeds", "verdict"),
    [(1, 6, "supported"), (-1, 6, "contradicted"), (1, 5, "suggested"), (-1, 5, "suggested against")],
)
def test_a_verdict_follows_the_numbers(make_run: Callable, tmp_path: Path, sign: int, seeds: int, verdict: str) -> None:
    for seed in range(seeds):
        for model, contrast in (("vit", 0.1), ("convnet", -0.2)):
            scalars = {"high_minus_low": sign * (contrast + 0.01 * seed * contrast), "clean_accuracy": 0.5}
            run = make_run(model, seed)
            write_scalars(run, "frequency_noise_robustness", scalars, solver={"construction": "equal_rms"})
    judged = claim_verdicts.judge(bench(tmp_path), [c for c in CLAIMS if c.name == "noise_bands"])
    assert [j.verdict for j in judged] == [verdict]


@pytest.mark.parametrize("positions", [[math.log(share) for share in (0.05, 0.135, 0.37, 1.0)], [0.0, 1.0, 2.0, 3.0]])
def test_equal_numbers_have_a_slope_of_zero_and_no_rounding(positions: list[float]) -> None:
    """Sums of equal numbers times centered positions left 1e-17 of one sign, which the t-test took for an effect."""
    runs = [(x, {seed: seed for seed in range(10)}) for x in positions]
    found = effect_sizes.slopes(runs, lambda seed: 0.1 + 0.037 * seed)
    assert list(found.values()) == [0.0] * 10
    rising = effect_sizes.slopes(runs, lambda seed: None if seed > 1 else 0.1)
    assert rising == {0: 0.0, 1: 0.0}
