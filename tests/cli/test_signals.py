"""Real signals to this process: each command saves what it has and ends with the signal's exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.runs.report_runs import curve, spectrum, write_run
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.cli import exit_codes, report, reproduce_jobs
from vitscope.reports.figures import figure_worker
from vitscope.reproduce import trial_jobs
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.planned_work import TRAIN, PlannedTrial
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime import stop_flag
from vitscope.training.lightning_module import Classifier

CODES = {signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {signum: signal.getsignal(signum) for signum in CODES}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)
    stop_flag.clear()


@pytest.mark.parametrize("signum", CODES)
def test_every_signal_saves_and_has_its_code(call, tiny, tmp_path, monkeypatch, capsys, signum) -> None:
    """Saved at that step, W&B told that the run will come back, one line that says how to go on, the same code on disk."""
    told = []
    monkeypatch.setattr(WandbMirror, "preempting", lambda self: told.append("preempting"))
    monkeypatch.setattr(WandbMirror, "finish", lambda self, code: told.append(code))
    begin = Classifier.on_train_batch_start

    def signalled(self: Classifier, batch: object, batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signum)
        begin(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "on_train_batch_start", signalled)
    assert call("train", *tiny, "analysis=[]", "test=false") == CODES[signum]
    run = only_run(tmp_path)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]  # of a slow machine
    assert err == [f"stopped by {signal.Signals(signum).name}; resume with run={run} ckpt_path=last"]
    assert sorted(losses(run)) == [0, 1]
    assert checkpoint_io.read(checkpoint_io.newest(run / "checkpoints"))["global_step"] == 2
    facts = json.loads((run / "provenance.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("stopped", CODES[signum])
    assert told == ["preempting", CODES[signum]]


def test_nohup_is_respected() -> None:
    """A terminal that closes does not end what was started so that it would not; the scheduler's signals still do."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def command() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        stop_flag.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        stop_flag.check()

    assert exit_codes.run_command(command) == 143
    assert stop_flag.requested() == signal.SIGUSR1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["training_step", "validation_step", "test_step"])
def test_a_training_without_checkpoints_stops_too(call, tiny, tmp_path, monkeypatch, capsys, place, signum) -> None:
    step = getattr(Classifier, place)

    def signalled(self: Classifier, *args: object) -> object:
        os.kill(os.getpid(), signum)
        return step(self, *args)

    monkeypatch.setattr(Classifier, place, signalled)
    assert call("train", *tiny, "analysis=[]", "callbacks=[]") == CODES[signum]
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]
    assert err == [f"stopped by {signal.Signals(signum).name}"]  # there is nothing to go on from
    assert len(losses(only_run(tmp_path))) == (0 if place == "training_step" else 4)


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def command() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)  # another signal is no second interrupt
        assert ended == []
        stop_flag.request(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        stop_flag.check()

    assert exit_codes.run_command(command) == 130
    assert ended == [130]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_analyze(call, trained, tmp_path, monkeypatch, signum) -> None:
    """Stopped within a measure: no result, and neither the run nor its checkpoints changed."""
    run = trained("analysis=[]", "test=false")
    kept = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "log.txt"}
    forward = "vitscope.core.feature_pass.track"

    def signalled(items, *args, **kwargs):
        os.kill(os.getpid(), signum)
        stop_flag.check()
        yield from items

    monkeypatch.setattr(forward, signalled)
    assert call("analyze", f"run={run}", "analysis=[fourier]", "analysis.fourier.probe.n_images=8") == CODES[signum]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "log.txt"} == kept
    model = ["model=vit", "model.depth=1", "model.patch_size=8", "data=digits", f"paths.runs={tmp_path}/other"]
    assert call("analyze", *model, "analysis=[fourier]", "analysis.fourier.probe.n_images=8") == CODES[signum]
    (other,) = (tmp_path / "other").iterdir()
    facts = json.loads((other / "provenance.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("stopped", CODES[signum])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signum: int
) -> None:
    for model in ("vit", "pit"):
        write_run(tmp_path / "runs", model, measured={"hessian": spectrum(), "slice": curve()})
    draw = figure_worker.draw
    drawn = []

    def signalled(job: figure_worker.Job) -> figure_worker.Picture:
        drawn.append(job)
        os.kill(os.getpid(), signum)
        return draw(job)

    monkeypatch.setattr(figure_worker, "draw", signalled)
    monkeypatch.setattr(sys, "argv", ["report.py", f"paths.runs={tmp_path}/runs", f"paths.figures={tmp_path}/figures"])
    assert exit_codes.run_command(report._command) == CODES[signal.Signals(signum)]
    assert len(drawn) == 1, "it went on to the next figure"
    assert not (tmp_path / "figures" / "report.html").exists()
    assert capsys.readouterr().err == f"stopped by {signal.Signals(signum).name}\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    """The processes that train are asked to save and waited for; what was finished before is kept."""
    events = []

    class Training:
        code: int | None = None

        def poll(self) -> int | None:
            return self.code

        def send_signal(self, sig: int, /) -> None:
            events.append("asked")

        def wait(self, timeout: float | None = None) -> None:
            events.append("waited for")
            self.code = 143

        def kill_all(self) -> None:
            events.append("killed")

    def fork(job: trial_jobs.TrialJob, slot: object) -> Training:
        training = Training()
        if job.trial.overrides == ("seed=0",):
            trial_jobs.write_outcome(Outcome(tmp_path / "first"), job.folder)
            training.code = 0
        return training

    def planned(trials: list[Trial], root: Path, checks: bool) -> list[PlannedTrial]:
        return [PlannedTrial(trial, {}, trial.name, TRAIN, ()) for trial in trials]

    monkeypatch.setattr(reproduce_jobs, "fork", fork)
    monkeypatch.setattr(reproduce_jobs.planned_work, "plan_trials", planned)
    monkeypatch.setattr(reproduce_jobs.cost_estimates, "estimate", lambda planned, rates: [])
    finished = []
    trials = [Trial((f"seed={seed}",)) for seed in range(2)]

    def command() -> None:
        work = reproduce_jobs.work(None, 2, launcher="local", slurm={}, rates=lambda: None, checks=False)
        for trial, outcome in work(trials, tmp_path):
            finished.append((trial.name, outcome.run))
            os.kill(os.getpid(), signum)

    assert exit_codes.run_command(command) == CODES[signal.Signals(signum)]
    assert events == ["asked", "waited for"]
    assert finished == [("seed=0", tmp_path / "first")]
