"""Trials of a reproduction side by side: order, shared trainings, deaths, stops, SLURM, the bar and the time left."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from tests.fixtures.programs import job_functions, slurm_commands
from vitscope.cli import reproduce_jobs
from vitscope.reproduce import job_display, plan, slurm_job, trial_jobs
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.planned_work import EXISTS, TRAIN, PlannedTrial
from vitscope.reproduce.trial_jobs import TrialJob, TrialJobs
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import trial_process
from vitscope.sweep.forked_job import ForkedJob
from vitscope.sweep.trial_process import JobProcess, Slot

ROOT = Path(__file__).parents[2]


def planned(*overrides: str, identity: str = "", state: str = TRAIN) -> PlannedTrial:
    return PlannedTrial(Trial(overrides), {}, identity or " ".join(overrides), state, ())


def fork(job: TrialJob, slot: Slot) -> JobProcess:
    arguments = (job.trial, job.folder.parents[1], job.folder)
    return ForkedJob(job_functions.tried, arguments, trial_process.environment(slot), job.output, job_functions.IMPORTS)


def spans(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "spans.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trials_run_side_by_side_one_a_gpu_and_those_of_one_training_in_turn(tmp_path: Path) -> None:
    trials = [planned(f"run={name}", "seconds=0.4", identity=name[0]) for name in ("a1", "a2", "b1", "b2")]
    jobs = TrialJobs(trials, tmp_path, fork)
    outcomes = dict(trial_jobs.outcomes(jobs, trial_process.slots("0,1", None)))
    assert [outcomes[p.trial].results for p in trials] == [("hessian/end-0badcafe",)] * 4
    assert outcomes[trials[0].trial].run == tmp_path / "run=a1"
    by_name = {span["name"].split()[0].removeprefix("run="): span for span in spans(tmp_path)}
    assert {span["gpu"] for span in by_name.values()} == {"0", "1"}
    assert by_name["a1"]["start"] < by_name["b1"]["end"]  # at the same time
    assert by_name["b1"]["start"] < by_name["a1"]["end"]
    for training in "ab":  # one after the other
        assert by_name[f"{training}1"]["end"] <= by_name[f"{training}2"]["start"]


def test_a_job_that_dies_or_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    trials = [planned("seed=0"), planned("seed=1", "do=die"), planned("seed=2", "do=fail"), planned("seed=3")]
    jobs = TrialJobs(trials, tmp_path, fork)
    outcomes = dict(trial_jobs.outcomes(jobs, trial_process.slots(None, 2)))
    runs = [outcomes[p.trial].run for p in trials]
    assert [run and run.name for run in runs] == ["seed=0", None, None, "seed=3"]
    (died,), (failed,) = outcomes[trials[1].trial].problems, outcomes[trials[2].trial].problems
    assert died == f"seed=1 do=die (its process ended with 9: out of memory; {jobs.jobs[1].output})"
    assert failed == "seed=2 do=fail (no such data)"


class Ending:
    """A process that runs until it is asked to end."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.code = events, None

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, sig: int, /) -> None:
        self.events.append(f"asked {signal.Signals(sig).name}")

    def wait(self, timeout: float | None = None) -> int:
        self.events.append("waited for")
        self.code = 143
        return 143

    def kill_all(self) -> None:
        self.events.append("killed")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_trials_save_and_keeps_what_is_finished(tmp_path: Path, signum: int) -> None:
    events: list[str] = []

    def launch(job: TrialJob, slot: Slot) -> JobProcess:
        process = Ending(events)
        if job.trial.overrides == ("seed=0",):
            trial_jobs.write_outcome(Outcome(tmp_path / "first"), job.folder)
            process.code = 0
        return process

    jobs = TrialJobs([planned("seed=0"), planned("seed=1")], tmp_path, launch)
    finished = []
    try:
        with pytest.raises(Interrupted):
            for trial, outcome in trial_jobs.outcomes(jobs, trial_process.slots(None, 2)):
                finished.append((trial.name, outcome.run))
                stop_flag.request(signum)
    finally:
        stop_flag.clear()
    assert finished == [("seed=0", tmp_path / "first")]
    assert events == [f"asked {signal.Signals(signum).name}", "waited for"]
    assert jobs.jobs[1].outcome is None


def test_an_outcome_of_an_earlier_start_is_not_taken(tmp_path: Path) -> None:
    jobs = TrialJobs([planned("seed=0", "do=die")], tmp_path, fork)
    trial_jobs.write_outcome(Outcome(tmp_path / "old"), jobs.jobs[0].folder)
    ((_, outcome),) = trial_jobs.outcomes(jobs, trial_process.slots(None, 1))
    assert outcome.run is None


def test_time_in_a_queue_is_none_of_a_job_s_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of 500 s before the start and of 300 s after a preemption are left out of 900 s."""
    process = SimpleNamespace(is_queued=True)
    jobs = TrialJobs([planned("seed=0")], tmp_path, lambda job, slot: cast(Any, process))
    clock = 1000.0
    monkeypatch.setattr(trial_jobs.time, "monotonic", lambda: clock)
    job = jobs.next_job()
    assert job is not None
    jobs.start(job, trial_process.Slot("slurm0", {}))
    for seconds, is_queued in ((500, True), (60, False), (300, True), (40, False)):
        process.is_queued = is_queued
        for _ in range(seconds // 10):
            clock += 10
            jobs.watch()
    trial_jobs.write_outcome(Outcome(None), job.folder)
    jobs.end(job, cast(Any, process), stopping=False)
    assert job.seconds == 100.0


def test_time_left_goes_by_estimates_then_by_jobs_that_ended() -> None:
    def job(name: str, state: str = TRAIN, seconds: float = 0.0) -> TrialJob:
        ended = Outcome(Path("run")) if seconds else None
        return TrialJob(planned(name, state=state), Path("folder"), seconds=seconds, outcome=ended)

    unknown = job_display.TimeLeft({}, 2)
    assert unknown.text([job("a"), job("b")]) == "time left unknown"
    assert unknown.estimate([job("a", seconds=300.0), job("b"), job("c"), job("d", EXISTS)]) == pytest.approx(
        300.5
    )  # (300 + 300 + 1) / 2
    # jobs with nothing to do say nothing of those that train
    assert unknown.estimate([job("a", EXISTS, seconds=2.0), job("b")]) is None
    stated = job_display.TimeLeft({Trial(("a",)): 7200.0, Trial(("b",)): 3600.0}, 2)
    assert stated.text([job("a"), job("b")]) == "about 2 h left"  # the longer one: there are two slots
    failed = job("a", seconds=2.0)
    failed.outcome = Outcome(None, ("a: failed",))
    assert unknown.estimate([failed, job("b")]) is None


def test_the_bar_names_the_running_jobs_and_their_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    screen, printed = io.StringIO(), io.StringIO()
    console = Console(width=120, height=30, file=screen, force_terminal=True)
    display = job_display.JobDisplay(tmp_path, job_display.TimeLeft({}, 2), console)
    jobs = TrialJobs(
        [planned("model=vit", "profile=smoke"), planned("model=swin")], tmp_path, lambda job, slot: Ending([]), display
    )
    with display:
        job = jobs.next_job()
        assert job is not None
        jobs.start(job, Slot("gpu0", {}))
        Console(width=120, file=printed).print(display.picture(jobs))
    text = printed.getvalue()
    assert "0/2, 0 s, time left unknown" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith(" gpu0")]
    assert row[:3] == ["gpu0", "model=vit", "starting"]
    assert row[-1] == job.folder.name
    assert "jobs/<output>/output.txt" in text
    assert "model=vit" in screen.getvalue()


def test_names_leave_out_what_all_runs_share(tmp_path: Path) -> None:
    trials = [planned("model=vit", f"model.depth={depth}", "optimizer.lr=1e-3", "seed=0") for depth in (2, 4)]
    jobs = TrialJobs(trials, tmp_path, fork).jobs
    assert [job_display._short_name(job, jobs) for job in jobs] == [
        "model=vit model.depth=2 seed=0", "model=vit model.depth=4 seed=0",
    ]  # fmt: skip
    assert job_display._short_name(jobs[0], jobs[:1]) == jobs[0].trial.name


def test_without_a_terminal_lines_say_what_ended_and_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    console = Console(file=io.StringIO())
    trials = [planned(f"seed={seed}") for seed in range(3)]
    display = job_display.JobDisplay(tmp_path, job_display.TimeLeft({p.trial: 60.0 for p in trials}, 1), console)
    with caplog.at_level("INFO", logger="vitscope"), display:
        list(trial_jobs.outcomes(TrialJobs(trials, tmp_path, fork, display), trial_process.slots(None, 1)))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("cpu0: seed=0, output ")
    assert lines[1].startswith("[1/3, ")
    assert lines[1].endswith(", about 2 min left] done: seed=0")
    assert lines[-1].endswith("s] done: seed=2")


@pytest.mark.slow  # two new interpreters
def test_trials_are_submitted_to_slurm_and_their_outcomes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real submitit writes the batch files, asks for the states and reads the results of stand-ins of SLURM's commands."""
    pytest.importorskip("submitit")
    commands = slurm_commands.write(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path))
    monkeypatch.setattr(reproduce_jobs.reproduce_job, "run_submitted_job", job_functions.submitted_tried)
    root = tmp_path / "runs"
    executor = slurm_job.executor(root / "jobs" / "slurm", {**plan.read()["slurm"], "partition": "gpu", "time": 600})
    trials = [planned("seed=0"), planned("seed=1", "do=fail")]
    jobs = TrialJobs(trials, root, reproduce_jobs.submission(executor))
    outcomes = dict(trial_jobs.outcomes(jobs, [Slot("slurm0", {}), Slot("slurm1", {})]))
    assert outcomes[trials[0].trial].run == root / "seed=0"
    assert outcomes[trials[1].trial].problems == ("seed=1 do=fail (no such data)",)
    scripts = [file.read_text() for file in (tmp_path / "scripts").iterdir()]
    assert len(scripts) == 2
    for line in ("--partition=gpu", "--time=600", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=8"):
        assert all(f"#SBATCH {line}\n" in script for script in scripts), line
    names = {line for script in scripts for line in script.splitlines() if "--job-name" in line}
    assert names == {f"#SBATCH --job-name={job.folder.name}" for job in jobs.jobs}


def test_a_submitted_job_is_polled_cancelled_and_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        job_id, states, cancelled = "7", ["PENDING", "RUNNING"], 0

        @property
        def state(self) -> str:
            return self.states[0] if self.states else "COMPLETED"

        def done(self) -> bool:
            return not self.states or self.cancelled > 0

        def exception(self) -> Exception | None:
            return None

        def result(self) -> int:
            return 3

        def cancel(self, check: bool) -> None:
            self.cancelled += 1

    monkeypatch.setattr(slurm_job, "POLL_S", 0.0)
    job = Job()
    process = slurm_job.SubmittedJob(job)
    assert process.poll() is None
    assert process.is_queued
    job.states = ["RUNNING"]
    assert not process.is_queued
    job.states = []
    assert process.poll() == 3
    assert not process.is_queued
    cancelled = slurm_job.SubmittedJob(job := Job())
    trial_process.stop([cancelled], signal.SIGTERM)
    assert job.cancelled == 1
    assert trial_process.exit_code(cancelled) == 143
    resumable = slurm_job.ResumableJob(max, (1, 5))
    assert resumable() == 5
    helpers = SimpleNamespace(helpers=SimpleNamespace(DelayedSubmission=lambda call: ("again", call)))
    monkeypatch.setattr(slurm_job.importlib, "import_module", lambda name: helpers)
    assert resumable.checkpoint() == ("again", resumable)


def test_what_slurm_needs_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ImportError(name)

    with monkeypatch.context() as patch:
        patch.setattr(slurm_job.importlib, "import_module", without)
        with pytest.raises(ConfigError, match=r"submitit is not installed; pip install 'vitscope\[submitit\]'"):
            slurm_job.executor(tmp_path, {})
    parameters: dict[str, Any] = {}

    class Executor:
        def __init__(self, **_: object) -> None: ...

        def update_parameters(self, **changes: Any) -> None:
            if "slurm_partitoin" in changes:
                raise NameError("Unknown argument 'slurm_partitoin'")
            parameters.update(changes)

    monkeypatch.setattr(slurm_job.importlib, "import_module", lambda name: SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(slurm_job.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no SLURM here .sbatch not found.; run it on a login node"):
        slurm_job.executor(tmp_path, {})
    monkeypatch.setattr(slurm_job.shutil, "which", lambda name: "/usr/bin/sbatch")
    slurm_job.executor(tmp_path, {"partition": "gpu", "time": 600})
    assert parameters == {"slurm_partition": "gpu", "slurm_time": 600}
    with pytest.raises(ConfigError, match="slurm.partitoin=gpu: submitit refuses it"):
        slurm_job.executor(tmp_path, {"partitoin": "gpu"})


def test_a_job_on_a_compute_node_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    seen: dict[str, str | None] = {}

    def run_job(trial: Trial, root: Path, folder: Path) -> int:
        names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID", "MARK")
        seen.update({name: os.environ.get(name) for name in names})
        os.write(1, b"in the job\n")
        return 0

    monkeypatch.setattr(reproduce_jobs.reproduce_job, "run_job", run_job)
    folder = tmp_path / "jobs" / "one"
    assert reproduce_jobs.reproduce_job.run_submitted_job(Trial(("seed=0",)), tmp_path, folder, {"MARK": "1"}) == 0
    monkeypatch.delenv("MARK", raising=False)
    assert seen == {"SLURM_NTASKS": None, "SLURM_PROCID": None, "SLURM_JOB_ID": "7", "MARK": "1"}
    assert (folder / "output.txt").read_text() == "in the job\n"
