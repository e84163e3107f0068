"""Several invocations share a folder of trials: none runs twice, a dead one's is taken over once, machines' clocks may differ."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.fixtures.programs.processes import wait_until
from tests.sweep.test_local_runner import PROGRAM, local, starts, sweep_of
from vitscope.reproduce import trial_jobs
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.planned_work import TRAIN, PlannedTrial
from vitscope.reproduce.trial_jobs import TrialJob, TrialJobs
from vitscope.runs import run_lock
from vitscope.runtime import progress
from vitscope.sweep import sweep_file, trial_leases, trial_process
from vitscope.sweep.sweep_file import Sweep
from vitscope.sweep.trial_leases import TrialLeases
from vitscope.sweep.trial_process import ChildProcess, JobProcess, Slot

#: a lock of a process on another machine
ELSEWHERE = {"machine": "00000000", "host": "elsewhere", "pid": 1, "started": 1, "token": "0"}


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_leases, "LOOK_S", 0.02)
    monkeypatch.setattr(progress, "enabled", False)


def tiny(root: Path, seconds: float) -> Callable[[TrialJob, Slot], JobProcess]:
    """Return a launcher of trials that write down their start, sleep and write their outcome; they die with who started them."""

    def launch(job: TrialJob, slot: Slot) -> JobProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        outcome = json.dumps({"run": str(root / job.trial.name), "problems": [], "results": [job.trial.name]})
        script = (
            f"echo {job.trial.name} >> starts.txt; sleep {seconds}; echo {job.trial.name} >> ends.txt; "
            f"echo '{outcome}' > {job.folder}/new; mv {job.folder}/new {job.folder}/{trial_jobs.OUTCOME}"
        )
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(9)

        return ChildProcess(["sh", "-c", script], cwd=root, preexec_fn=die_with_parent)

    return launch


def invocation(root: Path, n_trials: int, seconds: float) -> int:
    """Perform trials in a forked process of its own, which writes the outcomes that it knows at the end; return its number."""
    root.mkdir(exist_ok=True)
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        planned = [
            PlannedTrial(Trial((f"seed={i}",)), OmegaConf.create({}), str(i), TRAIN, ()) for i in range(n_trials)
        ]
        jobs = TrialJobs(planned, root, tiny(root, seconds))
        outcomes = dict(trial_jobs.outcomes(jobs, trial_process.slots(None, 1)))
        (root / f"known-{os.getpid()}").write_text(json.dumps({t.name: o.results for t, o in outcomes.items()}))
        code = 0
    finally:
        os._exit(code)


def lines(path: Path) -> Counter[str]:
    return Counter(path.read_text().split()) if path.exists() else Counter()


def test_two_invocations_run_each_trial_once_and_both_know_all_outcomes(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    names = [f"seed={i}" for i in range(20)]
    children = [invocation(root, 20, 0.01) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert lines(root / "starts.txt") == Counter(names)
    for child in children:
        assert json.loads((root / f"known-{child}").read_text()) == {name: [name] for name in names}
    assert not list((root / trial_jobs.FOLDER).rglob(run_lock.FILE))  # all leases are given back


def test_the_trials_of_a_killed_invocation_are_taken_over_once(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    names = [f"seed={i}" for i in range(12)]
    killed = invocation(root, 12, 0.15)
    others = [invocation(root, 12, 0.15) for _ in range(2)]
    while lines(root / "starts.txt").total() < 5:
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert [os.waitpid(child, 0)[1] for child in others] == [0, 0]
    counts = lines(root / "starts.txt")
    assert set(counts) == set(names)
    assert counts.total() <= 13  # the one that the killed invocation was at
    assert lines(root / "ends.txt") == Counter(names)  # and it ended nowhere twice
    for child in others:
        known = json.loads((root / f"known-{child}").read_text())
        assert {name: known[name] for name in names} == {name: [name] for name in names}


def held_elsewhere(folder: Path, age: float) -> None:
    """Write a lease of another machine whose last heartbeat was ``age`` seconds ago by the clock of the file system."""
    folder.mkdir(parents=True)
    path = folder / run_lock.FILE
    path.write_text(json.dumps(ELSEWHERE))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


@pytest.mark.parametrize("skew", [-1e6, 0.0, 1e6])
def test_a_lease_s_age_is_that_of_the_file_system_whatever_the_machine_s_clock_says(
    tmp_path: Path, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + skew)
    held_elsewhere(tmp_path / trial_leases.FOLDER / "alive", run_lock.STALE_AFTER - 60)
    held_elsewhere(tmp_path / trial_leases.FOLDER / "dead", run_lock.STALE_AFTER + 60)
    leases = TrialLeases(tmp_path)
    assert not leases.acquire("alive")
    assert leases.acquire("dead")
    assert leases.acquire("dead")  # it has it
    assert not TrialLeases(tmp_path).acquire("dead")  # another invocation
    leases.close()
    assert TrialLeases(tmp_path).acquire("dead")
    run_lock.release(tmp_path / trial_leases.FOLDER / "dead")
    for name, in_use in (("alive", True), ("dead", False)):
        held_elsewhere(tmp_path / name, run_lock.STALE_AFTER + (-60 if in_use else 60))
        assert trial_leases.is_in_use(tmp_path / name) is in_use
    assert not trial_leases.is_in_use(tmp_path / "nothing")


def test_an_outcome_counts_if_it_was_written_while_the_invocation_ran(tmp_path: Path) -> None:
    leases = TrialLeases(tmp_path)
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    earlier.touch()
    assert not leases.is_new(earlier)
    time.sleep(0.02)  # of the file system's clock, which ticks each 4 or 10 ms
    leases.begin()
    time.sleep(0.02)
    later.touch()
    assert (leases.is_new(earlier), leases.is_new(later), leases.is_new(tmp_path / "none")) == (False, True, False)


def test_a_child_that_a_killed_invocation_left_is_waited_for(tmp_path: Path) -> None:
    planned = [PlannedTrial(Trial(("seed=0",)), OmegaConf.create({}), "0", TRAIN, ())]
    jobs = TrialJobs(planned, tmp_path, lambda job, slot: pytest.fail("started"))
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        folder = jobs.jobs[0].folder
        folder.mkdir(parents=True)
        facts = {**run_lock._own_facts(), "pid": sleeper.pid, "started": run_lock._start_time(sleeper.pid)}
        (folder / run_lock.FILE).write_text(json.dumps(facts))
        assert jobs.next_job() is None
        assert jobs.waits_for_others()
    finally:
        sleeper.kill()
        sleeper.wait()
    time.sleep(0.03)
    assert jobs.next_job() is jobs.jobs[0]
    jobs.close()


def test_two_invocations_share_a_sweep(tmp_path: Path) -> None:
    sweep = sweep_of(do=["finish", "fail"], seed=[0, 1, 2])
    ends: list[int] = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            code = 99
            try:
                code = local(sweep, tmp_path, jobs=1).run()
            finally:
                os._exit(code)
        ends.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ends]
    assert codes == [3, 3]  # both tell of the trials that failed, wherever they ran
    again = local(sweep, tmp_path)
    folders = [again.folder / sweep_file.folder_name(i, params) for i, params in enumerate(again.search.trials)]
    n_starts = [len((folder / "starts.txt").read_text().splitlines()) for folder in folders]
    assert n_starts == [1] * 6
    assert again.run() == 0  # what failed is tried again, what finished is not
    assert [len(starts(trial)) for trial in again.trials] == [
        2 if trial.params["do"] == "fail" else 1 for trial in again.trials
    ]


def bayes_of(do: str, n: int) -> Sweep:
    metric = {"name": "val/accuracy", "goal": "maximize"}
    nodes = {"do": {"value": do}, "accuracy": {"min": 0.0, "max": 1.0}}
    content = {"program": str(PROGRAM), "method": "bayes", "metric": metric, "run_cap": n, "parameters": nodes}
    return Sweep(Path("x.yaml"), content)


def forked_sweep(sweep: Sweep, root: Path) -> int:
    """Run a sweep with one trial at a time in a forked process, whose number is returned; its exit code is the sweep's."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            code = local(sweep, root, jobs=1).run()
        finally:
            os._exit(code)
    return child


def test_two_invocations_share_a_sweep_that_learns(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = bayes_of("learn", 8)
    children = [forked_sweep(sweep, tmp_path) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    again = local(sweep, tmp_path)
    assert again.run() == 0
    assert [len(starts(trial)) for trial in again.trials] == [1] * 8
    values = [trial.value for trial in again.search._study.trials]
    assert values == pytest.approx([trial.params["accuracy"] for trial in again.trials])  # each was told once


def test_a_killed_invocation_s_trial_of_a_sweep_that_learns_is_taken_over(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = bayes_of("wait", 1)  # its trial waits until it is killed; the next start finishes
    killed = forked_sweep(sweep, tmp_path)
    wait_until(lambda: any(tmp_path.glob("*/*/ready")), "a trial")
    other = forked_sweep(sweep, tmp_path)
    time.sleep(0.2)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    (trial,) = tmp_path.glob("*/000-*")
    rows = [json.loads(line) for line in (trial / "starts.txt").read_text().splitlines()]
    assert [row["resumed"] for row in rows] == [False, True]
    assert [t.state.name for t in local(sweep, tmp_path).search._study.trials] == ["COMPLETE"]


def test_a_trial_that_died_is_told_to_other_invocations(tmp_path: Path) -> None:
    planned = [PlannedTrial(Trial(("seed=0",)), OmegaConf.create({}), "0", TRAIN, ())]
    jobs = TrialJobs(planned, tmp_path, lambda job, slot: ChildProcess(["sh", "-c", "exit 9"]))
    ((_, outcome),) = trial_jobs.outcomes(jobs, trial_process.slots(None, 1))
    assert outcome.problems
    assert trial_jobs.read_outcome(jobs.jobs[0].folder) == Outcome(None, outcome.problems, ())
