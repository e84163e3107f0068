"""One trial for real, in seconds: trained once, measured once, its checkpoints kept small."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscope.analyses import runner, spec
from vitscope.cli import reproduce
from vitscope.core.probe import Probe
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce import planned_work
from vitscope.reproduce import trial as trial_module
from vitscope.reproduce.command_line import Request
from vitscope.reproduce.cost_estimates import Rates, estimate
from vitscope.reproduce.plan import Trial
from vitscope.reproduce.planned_work import EXISTS, MEASURE, TRAIN
from vitscope.reproduce.trial import composed, perform
from vitscope.runs import run_search
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.run_dir import Run

# libraries that warn about themselves
pytestmark = [pytest.mark.usefixtures("small_figures"), pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*",
    "ignore:.*GPU available but not used.*", "ignore:.*lr_scheduler.step.*", "ignore:.*torch.jit.*",
)]  # fmt: skip

TINY = (
    "experiment=fig4_hessian_spectra", "profile=smoke", "caps=smoke", "logger=none", "objective=weak", "model=vit",
    "model.depth=1", "model.patch_size=8", "trainer.max_epochs=2", "callbacks.checkpoint.snapshots=[0]",
    "trainer.accelerator=cpu", "seed=0",
)  # fmt: skip


def test_bounds_of_the_profile_hold(tmp_path: Path) -> None:
    cfg = composed(Trial(tuple(o for o in TINY if o != "caps=smoke")), tmp_path)
    assert cfg.analysis.hessian.probe.n_images == cfg.caps.n_images == 16
    assert (cfg.trainer.max_epochs, cfg.trainer.limit_train_batches) == (2, 16)


def test_trained_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(TINY, ("init", "end"))
    first = perform(trial, tmp_path)
    assert first.run is not None
    assert first.problems == ()
    assert [name.partition("-")[0] for name in first.results] == ["hessian/init", "hessian/end"]
    assert all((first.run / "results" / f"{name}.npz").is_file() for name in first.results)
    for name in ("init.ckpt", "best.ckpt", "epoch-0000.ckpt"):
        assert checkpoint_io.read(first.run / "checkpoints" / name)["optimizer_states"] == [], name
    assert checkpoint_io.read(first.run / "checkpoints" / "last.ckpt")["optimizer_states"] != []

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured or trained again")

    monkeypatch.setattr("vitscope.reproduce.trial.train", forbidden)
    monkeypatch.setattr(runner, "_measured", forbidden)
    assert perform(trial, tmp_path) == first
    _check_plan_and_estimates(trial, tmp_path, Run(first.run))


def _check_plan_and_estimates(trial: Trial, root: Path, run: Run) -> None:
    """A plan knows the run again, tells it from runs with other settings, and estimates these from its rates."""
    with_other_seed = Trial((*TINY[:-1], "seed=1"), trial.tags)
    with_other_lr = Trial((*TINY, "optimizer.lr=0.5"), trial.tags)
    longer = Trial(tuple(o for o in TINY if o != "caps=smoke"))
    other_options = Trial((*TINY, "analysis.hessian.n_top=1"), ("end",))
    planned = planned_work.plan_trials([trial, with_other_seed, with_other_lr, longer, other_options], root)
    assert [p.state for p in planned] == [EXISTS, TRAIN, TRAIN, TRAIN, MEASURE]
    assert [p.run for p in planned] == [run, None, None, None, run]
    assert [len(p.missing) for p in planned] == [0, 2, 2, 1, 1]
    assert len({p.identity for p in planned}) == 4  # what is measured is no part of it
    facts = run.provenance()
    (hessian_s,) = facts["measured_s"].values()
    rates = Rates([root], {})
    costs = estimate(planned, rates)
    assert costs[1].seconds == pytest.approx(facts["wall_s"] + 2 * hessian_s)
    assert rates.training_seconds(planned[3]) is None  # 32 steps: three tell nothing of them
    assert [cost.unknown_time for cost in costs] == [0, 0, 0, 1, 1]  # a spectrum of more images, and of another n_top
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert [round(cost.size) for cost in costs[:3]] == [0, size, size]
    assert costs[3].size > 0  # of more epochs: by the model's parameters
    assert costs[4].size == 0
    nothing_known = estimate(planned, Rates([], {}))
    assert [cost.unknown_time for cost in nothing_known] == [0, 1, 1, 1, 1]
    assert all(cost.seconds == 0 for cost in nothing_known)
    stated = estimate(planned, Rates([], {"rates": {"seconds_per_training": 7, "source": "a guess"}}))
    assert [cost.seconds for cost in stated] == [0, 7, 7, 7, 0]
    assert stated[4].unknown_time == 1  # a measurement alone has no stated rate


def test_an_analysis_that_fails_or_lacks_its_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(probe: Probe, **_: object) -> None:
        raise RuntimeError("no memory left")

    parse = spec.parse
    monkeypatch.setattr(spec, "parse", lambda nodes: [spec.replaced(a, measure=broken) for a in parse(nodes)])
    outcome = perform(Trial(TINY, ("epoch-0007", "end")), tmp_path)
    assert outcome.run is not None
    assert outcome.results == ()
    lacking, failed = outcome.problems
    assert "hessian at epoch-0007" in lacking
    assert "no such file" in lacking
    assert failed == f"run {outcome.run.name}: hessian at end (no memory left)"


def test_an_interval_that_few_images_do_not_have_is_no_failure() -> None:
    nan = float("nan")
    scalars = {
        "contrast_msa": 0.1,
        "contrast_msa_low": nan,
        "contrast_mlp": nan,
        "contrast_mlp_low": nan,
        "ece_low": nan,
    }
    assert [name for name in scalars if trial_module._is_interval(name, scalars)] == ["contrast_msa_low"]


@pytest.mark.slow
def test_a_figure_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {
        "profiles": {"smoke": {"overrides": list(TINY[2:5]), "models": {"vit": " ".join(TINY[5:8])}}},
        "targets": {"fig2a": {"experiment": "fig2a_fourier", "runs": [{"model": "vit"}],
                              "draw": [{"fourier": {"view": "depth"}}, "branch_transfer", "variance"]}},
    }  # fmt: skip
    monkeypatch.setattr(reproduction, "read", lambda path=None: plan)
    for _ in range(2):
        reproduce.reproduce(Request(["fig2"], runs=tmp_path / "runs", out=tmp_path / "figures"))
    assert len(run_search.every(tmp_path / "runs")) == 1
    folders = {path.name for path in (tmp_path / "runs" / "jobs").iterdir() if path.is_dir()}
    assert folders - {"leases"} == {path.parent.name for path in (tmp_path / "runs" / "jobs").glob("*/outcome.json")}
    assert not list((tmp_path / "runs").rglob("run.lock"))  # leases and runs are given back
    drawn = {file.name for file in (tmp_path / "figures" / "fig2a").glob("*.png")}
    assert drawn == {"fourier-end-depth.png", "branch_transfer-end.png", "variance-end.png"}
