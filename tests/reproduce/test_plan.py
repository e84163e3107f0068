"""Requirements of a figure or table, read from the plan; every line of the real plan composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vitscope.analyses import spec
from vitscope.config import loading
from vitscope.config.validation import validate
from vitscope.reports.tables.headline_tables import TABLES
from vitscope.reproduce import plan
from vitscope.reproduce.trial import composed
from vitscope.runtime.errors import ConfigError

PLAN: dict[str, Any] = {
    "profiles": {
        "smoke": {
            "claim_seeds": 3,
            "overrides": ["logger=none"],
            "moments": {"early": ["epoch-0000"], "training": ["epoch-0000", "end"]},
            "models": {"vit": "model=vit model.depth=4", "convnet": "model=convnet"},
        },
        "big": {"models": {"vit": "model=vit", "convnet": "model=convnet model.depth=50"}},
    },
    "targets": {
        "fig1a": {"experiment": "a", "runs": [{"model": ["vit", "convnet"], "data.fraction": [0.1, 1.0]}], "draw": ["cka"],
                  "smoke": {"runs": [{"model": "vit", "model.depth": 2}]}},
        "fig1b": {"experiment": "b", "runs": [{"model": "vit"}], "at": "early", "draw": [{"fourier": {"view": "depth"}}]},
        "fig10": {"experiment": "c", "runs": [{"model": "vit", "experiment": "d", "at": "training"}],
                  "relate": [{"x": "model.depth", "y": ["test/accuracy"]}]},
        "table-claims": {"experiment": "e", "claims": True, "runs": [{"model": "vit"}], "table": "claims"},
    },
}  # fmt: skip


def test_a_grid_is_every_combination() -> None:
    target = plan.target("fig1a", PLAN, "big")
    assert [trial.name for trial in target.trials] == [
        "experiment=a profile=big model=vit data.fraction=0.1 seed=0",
        "experiment=a profile=big model=vit data.fraction=1.0 seed=0",
        "experiment=a profile=big model=convnet model.depth=50 data.fraction=0.1 seed=0",
        "experiment=a profile=big model=convnet model.depth=50 data.fraction=1.0 seed=0",
    ]
    assert target.drawings == (plan.Drawing("cka"),)


def test_a_profile_replaces_runs_and_a_run_its_models_keys() -> None:
    (trial,) = plan.target("fig1a", PLAN, "smoke").trials
    assert trial.name == "experiment=a profile=smoke logger=none model=vit model.depth=2 seed=0"
    assert trial.tags == ("end",)


def test_moments_are_the_profiles() -> None:
    assert plan.target("fig1b", PLAN, "smoke").tags == ("epoch-0000",)
    target = plan.target("fig10", PLAN, "smoke")
    assert target.tags == ("end",)  # the run is measured along training, the figure shows its end
    assert target.trials[0].tags == ("epoch-0000", "end")
    assert target.trials[0].overrides[0] == "experiment=d"


def test_claims_take_the_seeds_that_verdicts_need() -> None:
    assert len(plan.target("table-claims", PLAN, "smoke").trials) == 3
    assert len(plan.target("table-claims", PLAN, "smoke", seeds=5).trials) == 5
    assert len(plan.target("table-claims", PLAN, "big").trials) == 1
    assert len(plan.target("fig1b", PLAN, "smoke", seeds=2).trials) == 2
    later = plan.target("table-claims", PLAN, "smoke", seeds=range(5, 7)).trials
    assert [t.overrides[-1] for t in later] == ["seed=5", "seed=6"]


def test_overrides_hold_for_every_run_and_win_over_the_profile() -> None:
    target = plan.target("fig1a", PLAN, "smoke", 2, ("logger=wandb", "optimizer.lr=1e-3", "++analysis.cka.n=3"))
    assert [trial.name for trial in target.trials] == [
        f"experiment=a profile=smoke logger=wandb model=vit model.depth=2 seed={seed} optimizer.lr=1e-3 ++analysis.cka.n=3"
        for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match=r"data.fraction=0.5: fig1a sets this key itself \(0.1, 1.0\); leave it out"):
        plan.target("fig1a", PLAN, "big", 1, ("data.fraction=0.5",))


def test_names() -> None:
    assert plan.groups(PLAN) == {"fig1": ["fig1a", "fig1b"], "fig10": ["fig10"], "table-claims": ["table-claims"]}
    assert plan.select(["fig1"], PLAN) == ["fig1a", "fig1b"]  # not fig10
    assert plan.select(["fig1b", "fig1"], PLAN) == ["fig1b", "fig1a"]
    assert plan.select(["all"], PLAN) == list(PLAN["targets"])


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: plan.select(["fig2"], PLAN), "target=fig2: no such figure or table; did you mean"),
        (lambda: plan.target("fig1a", PLAN, "smoky"), "profile=smoky: no such profile; did you mean smoke"),
        (lambda: plan.target("fig1b", PLAN, "big"), "at=early: the profile has no such moment"),
    ],
)
def test_refused_by_name(call: Any, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert why in str(caught.value)


REAL = plan.read()


@pytest.mark.parametrize("profile", list(REAL["profiles"]))
def test_the_plan_names_what_there_is(profile: str) -> None:
    experiments = set(loading.options("experiment"))
    for name in REAL["targets"]:
        target = plan.target(name, REAL, profile)
        assert target.trials
        for trial in target.trials:
            assert trial.overrides[0].removeprefix("experiment=") in experiments, trial.name
        assert target.drawings or target.relations or target.table, f"{name} draws nothing"
        assert target.table in (*TABLES, "claims", "factors", None)


def test_every_figure_of_the_paper_has_a_target() -> None:
    figures = [
        "1a",
        "1b",
        "1c",
        "2a",
        "2b",
        "3",
        "4",
        "5a",
        "5b",
        "6",
        "7",
        "8",
        "9",
        "10a",
        "10b",
        "11",
        "12a",
        "12b",
        "12c",
    ]
    later = ["B", *(f"C{i}" for i in range(1, 8)), *(f"D{i}" for i in range(1, 5)), "E", "F1", "F2"]
    assert {f"fig{name}" for name in [*figures, *later]} <= set(REAL["targets"])
    assert {f"table-{name}" for name in (*TABLES, "claims")} <= set(REAL["targets"])


@pytest.mark.parametrize(
    "profile", [p if p == "smoke" else pytest.param(p, marks=pytest.mark.slow) for p in REAL["profiles"]]
)
def test_trials_compose_validate_and_measure_what_is_drawn(profile: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VITSCOPE_DATA", str(tmp_path))
    seen: set[str] = set()
    for name in REAL["targets"]:
        target = plan.target(name, REAL, profile)
        for trial in target.trials:
            kind = trial.overrides[0]  # one of a kind: composing takes a quarter of a second
            if "seed=0" not in trial.overrides or kind in seen:
                continue
            seen.add(kind)
            cfg = composed(trial, tmp_path / "runs")
            validate(cfg)
            measured = {analysis.name for analysis in spec.parse(cfg.analysis)}
            asked = {d.analysis for d in target.drawings}
            asked |= {q.partition(".")[0] for r in target.relations for q in (r.x, *r.y) if _is_scalar(q)}
            assert asked <= measured, f"{name}: {asked - measured} drawn but not measured"


def _is_scalar(quantity: str) -> bool:
    groups = ("model", "data", "objective", "optimizer", "trainer")
    return "/" not in quantity and quantity.partition(".")[0] not in groups


def test_the_generalization_gap_is_of_clean_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCOPE_DATA", str(tmp_path))
    target = plan.target("sharpness-gap", REAL, "cifar10_small")
    assert [relation.x for relation in target.relations] == ["evaluation.accuracy-test/accuracy"]
    probe = composed(target.trials[0], tmp_path / "runs").analysis.evaluation.probe
    assert (probe.split, probe.augment) == ("train", False)
    # of augmented images, while the weights change
    relations = [relation for name in REAL["targets"] for relation in plan.target(name, REAL, "smoke").relations]
    assert not [r for r in relations if "train/accuracy" in (*r.x.split("-"), *r.y)]
