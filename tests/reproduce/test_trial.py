"""One trial for real, in seconds: trained once, measured once, its checkpoints kept small."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscope.analyses import runner, spec
from vitscope.cli import reproduce
from vitscope.core.probe import Probe
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce.plan import Trial
from vitscope.reproduce.trial import composed, perform
from vitscope.runs.checkpoints import checkpoint_io

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


@pytest.mark.slow
def test_a_figure_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {
        "profiles": {"smoke": {"overrides": list(TINY[2:5]), "models": {"vit": " ".join(TINY[5:8])}}},
        "targets": {"fig2a": {"experiment": "fig2a_fourier", "runs": [{"model": "vit"}],
                              "draw": [{"fourier": {"view": "depth"}}, "branch_transfer", "variance"]}},
    }  # fmt: skip
    monkeypatch.setattr(reproduction, "read", lambda path=None: plan)
    for _ in range(2):
        reproduce.reproduce(["fig2"], "smoke", 1, tmp_path / "runs", tmp_path / "figures")
    assert len(list((tmp_path / "runs").iterdir())) == 1
    drawn = {file.name for file in (tmp_path / "figures" / "fig2a").glob("*.png")}
    assert drawn == {"fourier-end-depth.png", "branch_transfer-end.png", "variance-end.png"}
